//! JSON strings, as the bulk body needs them.

/// The bytes that a JSON string cannot hold as they are.
const ESCAPED: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        table[byte] = true;
        byte += 1;
    }
    table[b'"' as usize] = true;
    table[b'\\' as usize] = true;
    table
};

/// Appends `text` as a JSON string with its quotes. Bytes that are no UTF-8 become U+FFFD.
pub(super) fn write_string(out: &mut Vec<u8>, text: &[u8]) {
    out.reserve(text.len() + 2);
    out.push(b'"');
    if std::str::from_utf8(text).is_ok() {
        write_valid(out, text);
    } else {
        for chunk in text.utf8_chunks() {
            write_valid(out, chunk.valid().as_bytes());
            if !chunk.invalid().is_empty() {
                out.extend_from_slice("\u{FFFD}".as_bytes());
            }
        }
    }
    out.push(b'"');
}

fn write_valid(out: &mut Vec<u8>, mut text: &[u8]) {
    while let Some(at) = text.iter().position(|&byte| ESCAPED[usize::from(byte)]) {
        out.extend_from_slice(&text[..at]);
        write_escape(out, text[at]);
        text = &text[at + 1..];
    }
    out.extend_from_slice(text);
}

#[cold]
fn write_escape(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let short = match byte {
        b'"' => b'"',
        b'\\' => b'\\',
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        _ => {
            out.extend_from_slice(b"\\u00");
            out.push(HEX[usize::from(byte >> 4)]);
            out.push(HEX[usize::from(byte & 0xF)]);
            return;
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::write_string;

    proptest! {
        #[test]
        fn any_bytes_become_a_string_that_reads_back(text in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut out = Vec::new();
            write_string(&mut out, &text);
            let back: String = serde_json::from_slice(&out).expect("a JSON string");
            prop_assert_eq!(back, String::from_utf8_lossy(&text).into_owned());
            prop_assert!(out.iter().all(|&byte| byte >= 0x20));
        }
    }
}
