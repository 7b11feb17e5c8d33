//! The help, from the registry of commands.

use crate::engine::Status;
use crate::tui::app::App;
use crate::tui::command::COMMANDS;
use crate::tui::format;
use crate::tui::style::Token;

use super::{Piece, piece};

/// Its lines; what would be refused now is dim and says why.
pub(super) fn lines(app: &App, status: &Status) -> Vec<Vec<Piece>> {
    let mut lines: Vec<Vec<Piece>> = COMMANDS
        .iter()
        .filter(|info| !info.help.is_empty())
        .map(|info| {
            let refusal = info.refusal(app, status);
            let (key, text) = if refusal.is_some() { (Token::Dim, Token::Dim) } else { (Token::Accent, Token::Text) };
            let mut line = vec![piece(format::left(info.label, 13), key), piece(info.help, text)];
            if let Some(reason) = refusal {
                line.push(piece(format!(" ({reason})"), Token::Dim));
            }
            line
        })
        .collect();
    lines.push(Vec::new());
    for text in [
        "~ marks an estimate, - what is not known, ! what needs you.",
        "Times are UTC. Bytes are binary, rows are decimal.",
        "behind: WAL written and not yet indexed. WAL kept: what the slot",
        "holds on the primary. room, full in: until the slot may be lost.",
    ] {
        lines.push(vec![piece(text, Token::Dim)]);
    }
    lines
}
