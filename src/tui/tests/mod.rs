#![allow(clippy::unwrap_used)]

mod fixture;
mod keys;
mod screens;
mod terminal;

use crate as pgtide;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use crate::engine::Status;

use super::app::App;
use super::{ColorChoice, Options};

/// A screen as the tests want it, whatever their environment says.
fn app() -> App {
    let options =
        Options { color: ColorChoice::Always, ascii: Some(false), name: "NAME".to_owned(), ..Options::default() };
    App::new(&options)
}

/// `app` drawn at a size.
fn draw(app: &mut App, status: &Status, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| super::render(frame.buffer_mut(), app, status)).unwrap();
    terminal.backend().buffer().clone()
}

/// What a buffer shows; the cells that a wide character covers are left out, as in a terminal.
fn text(buffer: &Buffer) -> String {
    use unicode_width::UnicodeWidthStr;
    let mut text = String::new();
    for y in 0..buffer.area.height {
        let mut skip = 0;
        for x in 0..buffer.area.width {
            if skip > 0 {
                skip -= 1;
                continue;
            }
            let symbol = buffer[(x, y)].symbol();
            skip = symbol.width().saturating_sub(1);
            text.push_str(symbol);
        }
        text.push('\n');
    }
    text
}
