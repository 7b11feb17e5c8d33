//! Foreign text and columns: what a database holds is shown, never obeyed, and never wider than its place.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Stands for a character that a terminal must not get.
const HIDDEN: char = '·';

/// `text` without anything that a terminal would obey or that would make text look like other text: controls (C0, C1,
/// escape), bidi overrides, zero-width and other format characters become `·`, and so does an accent on top of four.
pub(super) fn clean(text: &str) -> String {
    let mut accents = 0;
    text.chars()
        .map(|c| {
            if c.is_control() || is_format(c) {
                return HIDDEN;
            }
            accents = if c.width() == Some(0) { accents + 1 } else { 0 };
            if accents > 4 { HIDDEN } else { c }
        })
        .collect()
}

/// Unicode's format characters, line separators, variation selectors and tags: no width of their own, yet they act.
fn is_format(c: char) -> bool {
    matches!(c,
        '\u{AD}' | '\u{34F}' | '\u{600}'..='\u{605}' | '\u{61C}' | '\u{6DD}' | '\u{70F}' | '\u{115F}' | '\u{1160}'
        | '\u{17B4}' | '\u{17B5}' | '\u{180B}'..='\u{180F}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}'
        | '\u{2060}'..='\u{206F}' | '\u{3164}' | '\u{FE00}'..='\u{FE0F}' | '\u{FEFF}' | '\u{FFA0}'
        | '\u{FFF0}'..='\u{FFFB}' | '\u{1BCA0}'..='\u{1BCA3}' | '\u{1D173}'..='\u{1D17A}'
        | '\u{E0000}'..='\u{E0FFF}')
}

/// `text` in at most `width` columns; what is cut ends in `…`.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let Some(room) = width.checked_sub(1) else { return String::new() };
    let mut used = 0;
    let mut kept = String::new();
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used > room {
            break;
        }
        kept.push(c);
    }
    kept.push('…');
    kept
}

/// `text` in exactly `width` columns, to the right.
pub(super) fn right(text: &str, width: usize) -> String {
    let text = cut(text, width);
    format!("{}{text}", " ".repeat(width.saturating_sub(text.width())))
}

/// `text` in exactly `width` columns, to the left.
pub(super) fn left(text: &str, width: usize) -> String {
    let text = cut(text, width);
    let pad = width.saturating_sub(text.width());
    format!("{text}{}", " ".repeat(pad))
}

/// `text` in lines of at most `width` columns, broken at spaces where there are any.
pub(super) fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(2);
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let mut word = word.to_owned();
        let used = lines.last().map_or(0, |line| line.width());
        if used > 0 && used + 1 + word.width() <= width {
            if let Some(line) = lines.last_mut() {
                line.push(' ');
                line.push_str(&word);
            }
            continue;
        }
        if used > 0 {
            lines.push(String::new());
        }
        while word.width() > width {
            let mut head = String::new();
            let mut head_width = 0;
            for c in word.chars() {
                head_width += c.width().unwrap_or(0);
                if head_width > width {
                    break;
                }
                head.push(c);
            }
            word.drain(..head.len());
            if let Some(line) = lines.last_mut() {
                *line = head;
            }
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            *line = word;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_foreign_reaches_the_terminal_as_an_order() {
        assert_eq!(clean("a\u{1b}[31mb\r\n\t\u{7f}\u{9b}2J"), "a·[31mb·····2J");
        assert_eq!(clean("ab\u{202e}dc\u{2066}\u{200d}\u{feff}"), "ab·dc···");
        assert_eq!(clean("naïve 表 e\u{301}"), "naïve 表 e\u{301}");
        assert_eq!(clean(&format!("z{}", "\u{301}".repeat(9))), format!("z{}·····", "\u{301}".repeat(4)));
    }

    #[test]
    fn text_fits_by_columns_not_by_characters() {
        assert_eq!(cut("order_items", 11), "order_items");
        assert_eq!(cut("order_items", 6), "order…");
        assert_eq!(cut("注文明細", 8), "注文明細");
        assert_eq!(cut("注文明細", 6), "注文…");
        assert_eq!((cut("abc", 0).as_str(), cut("abc", 1).as_str()), ("", "…"));
        assert_eq!((right("7", 3).as_str(), left("注", 4).as_str()), ("  7", "注  "));
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrap("", 4), [""]);
    }
}
