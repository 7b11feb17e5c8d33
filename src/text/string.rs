//! JSON strings.

/// Appends `bytes` as a JSON string. What is no UTF-8 becomes U+FFFD; the output holds no byte below 0x20.
///
/// ```
/// let mut out = Vec::new();
/// pgtide::text::write_string(&mut out, b"a\n\"b\"\xFF");
/// assert_eq!(out, "\"a\\n\\\"b\\\"\u{FFFD}\"".as_bytes());
/// ```
#[inline]
pub fn write_string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.reserve(bytes.len() + 2);
    out.push(b'"');
    if std::str::from_utf8(bytes).is_ok() {
        escape(out, bytes);
    } else {
        for chunk in bytes.utf8_chunks() {
            escape(out, chunk.valid().as_bytes());
            if !chunk.invalid().is_empty() {
                out.extend_from_slice("\u{FFFD}".as_bytes());
            }
        }
    }
    out.push(b'"');
}

/// Copies runs that need no escape whole.
#[inline]
fn escape(out: &mut Vec<u8>, mut bytes: &[u8]) {
    loop {
        let clean = clean_run(bytes);
        out.extend_from_slice(&bytes[..clean]);
        let Some(&byte) = bytes.get(clean) else { return };
        escape_byte(out, byte);
        bytes = &bytes[clean + 1..];
    }
}

const fn repeat(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// Length of the longest prefix without control characters, quotes and backslashes.
#[inline]
fn clean_run(bytes: &[u8]) -> usize {
    // The compiler makes few instructions of a block.
    let (blocks, _) = bytes.as_chunks::<32>();
    let escapes = |block: &&[u8; 32]| {
        block.iter().fold(false, |found, &byte| found | (byte < 0x20) | (byte == b'"') | (byte == b'\\'))
    };
    let clean = 32 * blocks.iter().take_while(|block| !escapes(block)).count();
    clean + clean_words(&bytes[clean..])
}

/// The same, looking at eight bytes at a time.
#[inline]
fn clean_words(bytes: &[u8]) -> usize {
    const HIGH: u64 = repeat(0x80);
    let (words, rest) = bytes.as_chunks::<8>();
    for (at, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let quote = word ^ repeat(b'"');
        let backslash = word ^ repeat(b'\\');
        // A borrow can mark a byte wrongly, but only one above a byte that is marked rightly.
        let found = (word.wrapping_sub(repeat(0x20)) & !word)
            | (quote.wrapping_sub(repeat(1)) & !quote)
            | (backslash.wrapping_sub(repeat(1)) & !backslash);
        if found & HIGH != 0 {
            return at * 8 + (found & HIGH).trailing_zeros() as usize / 8;
        }
    }
    let tail = rest.iter().position(|&byte| byte < 0x20 || byte == b'"' || byte == b'\\').unwrap_or(rest.len());
    words.len() * 8 + tail
}

fn escape_byte(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    match byte {
        b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
        b'\n' => out.extend_from_slice(b"\\n"),
        b'\r' => out.extend_from_slice(b"\\r"),
        b'\t' => out.extend_from_slice(b"\\t"),
        0x08 => out.extend_from_slice(b"\\b"),
        0x0C => out.extend_from_slice(b"\\f"),
        _ => {
            let digits = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]];
            out.extend_from_slice(b"\\u00");
            out.extend_from_slice(&digits);
        }
    }
}
