//! Colours and glyphs. A pane asks for a [`Token`] and never names a colour, so that colour, NO_COLOR and ASCII are each
//! decided here.

use std::env;

use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier, Style};

/// When to use colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColorChoice {
    /// Unless `NO_COLOR` is set to something or `TERM` is `dumb`.
    #[default]
    Auto,
    /// Whatever the environment says.
    Always,
    /// Attributes only: bold, dim, reverse.
    Never,
}

/// What a text means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Text,
    Ok,
    Busy,
    Wait,
    Warn,
    Bad,
    Dim,
    Accent,
    Title,
}

/// How tokens look. The terminal's own foreground and background stay, so that light and dark ones are readable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Theme {
    /// Colours may be used.
    pub(super) color: bool,
    /// Only ASCII may be written.
    pub(super) ascii: bool,
}

impl Theme {
    /// The theme that the options and the environment ask for: the option first, then `NO_COLOR`, then `TERM`.
    pub(super) fn choose(color: ColorChoice, ascii: Option<bool>) -> Theme {
        let variable = |name: &str| env::var(name).unwrap_or_default();
        Theme {
            color: wants_color(color, &variable("NO_COLOR"), &variable("TERM")),
            ascii: ascii.unwrap_or_else(|| {
                wants_ascii(&variable("LC_ALL"), &variable("LC_CTYPE"), &variable("LANG"), &variable("TERM"))
            }),
        }
    }

    /// The style of a token. Without colours it names no foreground and no background at all: with `NO_COLOR` set,
    /// crossterm 0.29 writes a full reset in their place, which would take the reverse off the selected row.
    pub(super) fn style(self, token: Token) -> Style {
        let style = Style::new();
        if self.color {
            match token {
                Token::Text => style,
                Token::Ok => style.fg(Color::Green),
                Token::Busy | Token::Accent => style.fg(Color::Cyan),
                Token::Wait | Token::Dim => style.add_modifier(Modifier::DIM),
                Token::Warn => style.fg(Color::Yellow),
                Token::Bad => style.fg(Color::Red).add_modifier(Modifier::BOLD),
                Token::Title => style.add_modifier(Modifier::BOLD),
            }
        } else {
            match token {
                Token::Text | Token::Ok | Token::Busy => style,
                Token::Wait | Token::Dim => style.add_modifier(Modifier::DIM),
                Token::Warn | Token::Bad | Token::Title | Token::Accent => style.add_modifier(Modifier::BOLD),
            }
        }
    }

    /// What a selected row gets on top; its `>` says the same without it.
    pub(super) fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    /// The border of a pane.
    pub(super) fn border(self, focused: bool) -> Style {
        self.style(if focused { Token::Accent } else { Token::Dim })
    }

    /// Writes everything in `buffer` that is not ASCII in ASCII, where the terminal cannot do better.
    pub(super) fn finish(self, buffer: &mut Buffer) {
        if !self.ascii {
            return;
        }
        for cell in &mut buffer.content {
            let symbol = cell.symbol();
            if !symbol.is_ascii() {
                let ascii = symbol.chars().next().map_or(' ', to_ascii);
                cell.set_char(ascii);
            }
        }
    }
}

fn to_ascii(glyph: char) -> char {
    match glyph {
        '─' => '-',
        '│' => '|',
        '┌' | '┐' | '└' | '┘' => '+',
        '█' => '#',
        '▒' => '=',
        '░' | '·' | '▁' => '.',
        '…' => '~',
        '▲' => '^',
        '▼' => 'v',
        '▂' => ':',
        '▃' | '▏' | '▎' => '-',
        '▄' | '▍' | '▌' => '=',
        '▅' | '▋' => '+',
        '▆' | '▊' => '*',
        '▇' | '▉' => '%',
        _ => '?',
    }
}

fn wants_color(choice: ColorChoice, no_color: &str, term: &str) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => no_color.is_empty() && term != "dumb",
    }
}

fn wants_ascii(lc_all: &str, lc_ctype: &str, lang: &str, term: &str) -> bool {
    let locale = [lc_all, lc_ctype, lang].into_iter().find(|value| !value.is_empty()).unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    // The Linux console has neither eighths nor shades.
    term == "linux" || !(locale.contains("utf-8") || locale.contains("utf8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::layout::Rect;

    #[test]
    fn the_flag_beats_no_color_beats_term() {
        assert!(wants_color(ColorChoice::Always, "1", "dumb"));
        assert!(!wants_color(ColorChoice::Never, "", "xterm-256color"));
        assert!(!wants_color(ColorChoice::Auto, "1", "xterm-256color"));
        assert!(!wants_color(ColorChoice::Auto, "", "dumb"));
        assert!(wants_color(ColorChoice::Auto, "", "xterm"));
    }

    #[test]
    fn the_first_locale_that_is_set_decides() {
        assert!(!wants_ascii("", "", "en_US.UTF-8", "xterm"));
        assert!(wants_ascii("C", "", "en_US.UTF-8", "xterm"));
        assert!(!wants_ascii("", "de_DE.utf8", "C", "xterm"));
        assert!(wants_ascii("", "", "", "xterm"));
        assert!(wants_ascii("", "", "en_US.UTF-8", "linux"));
    }

    #[test]
    fn without_colours_no_style_names_one() {
        let theme = Theme { color: false, ascii: false };
        for token in [
            Token::Text,
            Token::Ok,
            Token::Busy,
            Token::Wait,
            Token::Warn,
            Token::Bad,
            Token::Dim,
            Token::Accent,
            Token::Title,
        ] {
            let style = theme.style(token);
            assert_eq!((style.fg, style.bg), (None, None), "{token:?}");
        }
        assert_eq!((theme.selected().fg, theme.border(true).fg), (None, None));
    }

    #[test]
    fn ascii_means_ascii() {
        let mut buffer = Buffer::empty(Rect::new(0, 0, 12, 1));
        buffer.set_string(0, 0, "┌─█▋░▒·…表é▅", Style::new());
        Theme { color: false, ascii: true }.finish(&mut buffer);
        let text: String = buffer.content.iter().map(ratatui::buffer::Cell::symbol).collect();
        assert_eq!(text, "+-#+.=.~? ?+");
    }
}
