//! Durations, sizes and `${NAME}` references in the text of a scalar.

use std::time::Duration;

/// Go's duration syntax: `30s`, `100ms`, `1h30m`, `1.5s`, `0`. None for anything else and for what does not fit.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let number = rest.bytes().take_while(|byte| byte.is_ascii_digit() || *byte == b'.').count();
        let unit =
            rest[number..].chars().take_while(|c| !c.is_ascii_digit() && *c != '.').map(char::len_utf8).sum::<usize>();
        let nanos = match &rest[number..number + unit] {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = rest[..number].split_once('.').unwrap_or((&rest[..number], ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return None;
        }
        let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        total = total.checked_add(Duration::from_nanos(whole.checked_mul(nanos)?))?;
        // Digits beyond the nanosecond do not count, as in Go.
        let mut place = nanos;
        for digit in fraction.bytes() {
            place /= 10;
            total = total.checked_add(Duration::from_nanos(u64::from(digit - b'0') * place))?;
        }
        rest = &rest[number + unit..];
    }
    Some(total)
}

/// `10mb`, `1.5mb`, `512kib` or bytes; `kb` is 1024 bytes, as in the reference.
pub(super) fn size(text: &str) -> Option<u64> {
    if !text.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    parse_size::Config::new().with_binary().parse_size(text).ok()
}

/// `text` with its `${NAME}` and `${NAME:-default}` replaced and `$$` made `$`.
///
/// # Errors
/// In words: the variable is not set, or a `$` stands for nothing. They never hold a variable's value.
pub(super) fn expand(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((reference, after)) = after.strip_prefix('{').and_then(|body| body.split_once('}')) {
            let (name, default) = match reference.split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (reference, None),
            };
            if name.is_empty()
                || name.starts_with(|c: char| c.is_ascii_digit())
                || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            {
                return Err("`${...}` names no environment variable: write `${NAME}`, `${NAME:-default}`, or `$$` for a dollar sign".to_owned());
            }
            match (env(name).filter(|value| default.is_none() || !value.is_empty()), default) {
                (Some(value), _) => out.push_str(&value),
                (None, Some(default)) => out.push_str(default),
                (None, None) => {
                    return Err(format!(
                        "the environment variable {name} is not set: set it, or write `${{{name}:-default}}`"
                    ));
                }
            }
            rest = after;
        } else {
            return Err("a `$` that begins no `${NAME}`: write `$$` for a dollar sign".to_owned());
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        let ms = Duration::from_millis;
        for (text, expected) in [
            ("30s", ms(30_000)),
            ("100ms", ms(100)),
            ("5m", ms(300_000)),
            ("1h30m", ms(5_400_000)),
            ("1.5s", ms(1500)),
            (".5s", ms(500)),
            ("1.s", ms(1000)),
            ("0", ms(0)),
            ("1m0.5s", ms(60_500)),
            ("2µs", Duration::from_micros(2)),
            ("1.0000000019s", Duration::from_nanos(1_000_000_001)),
        ] {
            assert_eq!(duration(text), Some(expected), "{text}");
        }
        for text in ["", "30", "s", ".s", "1d", "-1s", "+1s", "1 s", "1..5s", "1s2", "99999999999h", "1é", "٣s"] {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_binary() {
        for (text, expected) in [
            ("10mb", 10 << 20),
            ("1.5mb", 3 << 19),
            ("512", 512),
            ("1kb", 1024),
            ("2KiB", 2048),
            ("1GB", 1 << 30),
            ("7b", 7),
        ] {
            assert_eq!(size(text), Some(expected), "{text}");
        }
        for text in ["", "mb", "-1mb", "10 potatoes", "10xb"] {
            assert_eq!(size(text), None, "{text}");
        }
    }

    #[test]
    fn references_are_replaced_and_dollars_kept() {
        let env = |name: &str| match name {
            "A" => Some("one".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        let cases = [
            ("plain", "plain"),
            ("${A}", "one"),
            ("<${A}/${A}>", "<one/one>"),
            ("${B:-two}", "two"),
            ("${EMPTY:-two}", "two"),
            ("[${EMPTY}]", "[]"),
            ("${A:-two}", "one"),
            ("a$$b", "a$b"),
            ("$${A}", "${A}"),
            ("${B:-}", ""),
        ];
        for (text, expected) in cases {
            assert_eq!(expand(text, &env).as_deref(), Ok(expected), "{text}");
        }
        assert_eq!(
            expand("${B}", &env),
            Err("the environment variable B is not set: set it, or write `${B:-default}`".to_owned())
        );
        for text in ["$A", "a$", "${", "${}", "${1A}", "${a b}"] {
            assert!(expand(text, &env).is_err(), "{text}");
        }
    }
}
