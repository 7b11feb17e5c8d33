//! Lines of `COPY ... TO STDOUT` in the text format.

use crate::change::Field;

use super::scalar::hex_digit;

/// A longer buffer held a huge value; it goes back to the system.
const SPARE_BYTES: usize = 32 << 20;

/// Splits lines into fields. Made once and used for many lines: it keeps its buffers.
///
/// ```
/// use pgtide::change::Field;
/// let mut splitter = pgtide::text::copy::Splitter::default();
/// let line = splitter.split(b"1\t\\N\ta\\tb\n");
/// assert_eq!(line.iter().collect::<Vec<_>>(), [Field::Text(b"1"), Field::Null, Field::Text(b"a\tb")]);
/// ```
#[derive(Debug, Default)]
pub struct Splitter {
    spans: Vec<Span>,
    unescaped: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum Span {
    Null,
    /// From where to where in the line itself.
    Line(usize, usize),
    /// From where to where in the buffer of unescaped values.
    Unescaped(usize, usize),
}

impl Splitter {
    /// The fields of one line, with or without its line end. Never fails: a backslash that means nothing stands for
    /// the byte after it.
    #[inline]
    pub fn split<'a>(&'a mut self, line: &'a [u8]) -> Line<'a> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        self.spans.clear();
        self.unescaped.clear();
        self.unescaped.shrink_to(SPARE_BYTES);
        let (mut start, mut escaped) = (0, false);
        for at in memchr::memchr2_iter(b'\t', b'\\', line) {
            if line[at] == b'\\' {
                escaped = true;
            } else {
                self.field(line, start, at, escaped);
                (start, escaped) = (at + 1, false);
            }
        }
        self.field(line, start, line.len(), escaped);
        Line { line, spans: &self.spans, unescaped: &self.unescaped }
    }

    #[inline]
    fn field(&mut self, line: &[u8], start: usize, end: usize, escaped: bool) {
        let span = if !escaped {
            Span::Line(start, end)
        } else if &line[start..end] == b"\\N" {
            Span::Null
        } else {
            let from = self.unescaped.len();
            unescape(&mut self.unescaped, &line[start..end]);
            Span::Unescaped(from, self.unescaped.len())
        };
        self.spans.push(span);
    }
}

/// A split line. It always has at least one field.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    line: &'a [u8],
    spans: &'a [Span],
    unescaped: &'a [u8],
}

impl<'a> Line<'a> {
    /// How many fields there are.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// The field at a position, counted from 0.
    #[must_use]
    pub fn get(&self, at: usize) -> Option<Field<'a>> {
        self.spans.get(at).map(|&span| self.resolve(span))
    }

    /// The fields in order.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Field<'a>> + Clone + use<'a> {
        let this = *self;
        self.spans.iter().map(move |&span| this.resolve(span))
    }

    #[inline]
    fn resolve(&self, span: Span) -> Field<'a> {
        match span {
            Span::Null => Field::Null,
            Span::Line(start, end) => Field::Text(&self.line[start..end]),
            Span::Unescaped(start, end) => Field::Text(&self.unescaped[start..end]),
        }
    }
}

fn unescape(out: &mut Vec<u8>, mut text: &[u8]) {
    while let Some(at) = memchr::memchr(b'\\', text) {
        out.extend_from_slice(&text[..at]);
        text = &text[at + 1..];
        let Some((&byte, rest)) = text.split_first() else {
            out.push(b'\\');
            return;
        };
        text = rest;
        let plain = match byte {
            b'b' => 0x08,
            b'f' => 0x0C,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'v' => 0x0B,
            b'0'..=b'7' => {
                let mut value = byte - b'0';
                for _ in 0..2 {
                    let Some((&digit @ b'0'..=b'7', rest)) = text.split_first() else { break };
                    // PostgreSQL keeps the low eight bits of \400 to \777 as well.
                    value = value << 3 | (digit - b'0');
                    text = rest;
                }
                value
            }
            b'x' => match text.split_first().and_then(|(&digit, rest)| Some((hex_digit(digit)?, rest))) {
                None => b'x',
                Some((mut value, rest)) => {
                    text = rest;
                    if let Some((digit, rest)) =
                        text.split_first().and_then(|(&digit, rest)| Some((hex_digit(digit)?, rest)))
                    {
                        value = value << 4 | digit;
                        text = rest;
                    }
                    value
                }
            },
            other => other,
        };
        out.push(plain);
    }
    out.extend_from_slice(text);
}
