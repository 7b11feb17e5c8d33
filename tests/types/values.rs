//! Values of PostgreSQL's types, as the text of SQL literals.

use std::fmt::Write as _;

/// A generator of values.
pub(crate) struct Values {
    random: fastrand::Rng,
}

impl Values {
    pub(crate) fn seeded(seed: u64) -> Self {
        println!("PGTIDE_TYPES_SEED={seed}");
        Self { random: fastrand::Rng::with_seed(seed) }
    }

    /// One in so many.
    pub(crate) fn one_in(&mut self, many: u32) -> bool {
        self.random.u32(..many) == 0
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.random.usize(..end)
    }

    /// A value of the type; one of `known` where there is no way to make one.
    pub(crate) fn of(&mut self, of: &str, known: &[String]) -> String {
        match of {
            "int2" => self.random.i16(..).to_string(),
            "int4" | "small" => self.random.i32(..).to_string(),
            "int8" => self.random.i64(..).to_string(),
            "oid" => self.random.u32(..).to_string(),
            "numeric" | "amount" => self.numeric(),
            "float4" => format!("{:e}", f32::from_bits(self.random.u32(..))),
            "float8" => format!("{:e}", f64::from_bits(self.random.u64(..))),
            "text" | "varchar" | "citext" => self.text(),
            "bytea" => {
                let length = self.below(40);
                (0..length).fold("\\x".to_owned(), |hex, _| format!("{hex}{:02x}", self.random.u8(..)))
            }
            "date" => self.moment(""),
            "timestamp" => {
                let time = self.time();
                self.moment(&time)
            }
            "timestamptz" | "instant" => {
                let time = format!("{}{:+03}:30", self.time(), self.random.i32(-15..=15));
                self.moment(&time)
            }
            "time" => self.time(),
            "interval" => {
                let (months, days) = (self.random.i32(-9999..9999), self.random.i32(-9999..9999));
                // PostgreSQL 14 takes no field beyond an int4, a number of microseconds for one.
                format!("{months} mons {days} days {}{}", if self.one_in(2) { "-" } else { "" }, self.time())
            }
            "json" | "jsonb" => self.json(0),
            "hstore" => {
                let (key, value) = (self.quoted(), if self.one_in(4) { "NULL".to_owned() } else { self.quoted() });
                format!("{key}=>{value}, a=>{}", self.quoted())
            }
            _ => known[self.below(known.len())].clone(),
        }
    }

    fn numeric(&mut self) -> String {
        let mut text = if self.one_in(2) { "-".to_owned() } else { String::new() };
        for _ in 0..=self.below(30) {
            text.push(self.random.digit(10));
        }
        text.push('.');
        for _ in 0..self.below(20) {
            text.push(self.random.digit(10));
        }
        text
    }

    /// Anything but U+0000, which PostgreSQL has in no text.
    fn text(&mut self) -> String {
        const ODD: [char; 16] = [
            '\u{1}',
            '\u{1f}',
            '\u{7f}',
            '\t',
            '\n',
            '\r',
            '\\',
            '"',
            '\'',
            '{',
            ',',
            ' ',
            '\u{e9}',
            '\u{2028}',
            '\u{feff}',
            '\u{1f600}',
        ];
        let length = self.below(20);
        (0..length).map(|_| if self.one_in(2) { ODD[self.below(16)] } else { self.random.alphanumeric() }).collect()
    }

    /// The text in quotes, as `hstore` takes it.
    fn quoted(&mut self) -> String {
        format!("\"{}\"", self.text().replace('\\', "\\\\").replace('"', "\\\""))
    }

    /// A day with this time, before or after Christ.
    fn moment(&mut self, time: &str) -> String {
        let (year, month, day) = (self.random.u32(1..=4000), self.random.u32(1..=12), self.random.u32(1..=28));
        format!("{year:04}-{month:02}-{day:02} {time}{}", if self.one_in(5) { " BC" } else { "" })
    }

    fn time(&mut self) -> String {
        let (hour, minute, second) = (self.random.u32(..24), self.random.u32(..60), self.random.u32(..60));
        format!("{hour:02}:{minute:02}:{second:02}.{}", self.random.u32(..1_000_000))
    }

    /// With white space, keys that occur twice, and numbers beyond what floating point holds.
    fn json(&mut self, depth: u32) -> String {
        let mut text = String::new();
        self.space(&mut text);
        match self.below(if depth < 3 { 7 } else { 5 }) {
            0 => text.push_str("null"),
            1 => text.push_str("true"),
            2 => drop(write!(text, "{}{}", self.random.u64(..), self.random.u64(..))),
            3 => drop(write!(text, "-{}.{}e-{}", self.random.u8(..), self.random.u64(..), self.random.u8(..))),
            4 => self.member(&mut text),
            5 => {
                text.push('[');
                for at in 0..self.below(4) {
                    text.push_str(if at > 0 { "," } else { "" });
                    text.push_str(&self.json(depth + 1));
                }
                text.push(']');
            }
            _ => {
                text.push('{');
                for at in 0..self.below(4) {
                    text.push_str(if at > 0 { "," } else { "" });
                    self.space(&mut text);
                    let name = ["\"a\"", "\"b\\n\\u0041\\\"\"", "\"\"", "\"\\ud83d\\ude00\""][self.below(4)];
                    text.push_str(name);
                    text.push(':');
                    text.push_str(&self.json(depth + 1));
                }
                text.push('}');
            }
        }
        self.space(&mut text);
        text
    }

    fn member(&mut self, text: &mut String) {
        text.push_str(&serde_json::to_string(&self.text()).unwrap());
    }

    fn space(&mut self, text: &mut String) {
        for _ in 0..self.below(3) {
            text.push([' ', '\n', '\r', '\t'][self.below(4)]);
        }
    }
}
