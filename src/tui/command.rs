//! The registry of commands: the hint bar, the help and the keys all read it.

use crossterm::event::KeyCode;

use crate::engine::{Phase, Status};

use super::app::{App, Pane, View};

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Quit,
    Interrupt,
    Help,
    Back,
    Show(View),
    NextPane,
    PreviousPane,
    Up,
    Down,
    Left,
    Right,
    Top,
    Bottom,
    PageUp,
    PageDown,
    HalfUp,
    HalfDown,
    Enter,
    Filter,
    Sort,
    Invert,
    Zoom,
    Freeze,
    Follow,
    Ages,
    Pause,
    PauseTable,
    Resnapshot,
    Redraw,
    Suspend,
    /// A character for the text that is being typed.
    Type(char),
    /// Take the last one back.
    Erase,
    /// Yes to a question.
    Yes,
    /// No to a question.
    No,
}

/// A key as the terminal reports it. Shift is part of the character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) code: KeyCode,
    pub(super) control: bool,
}

/// One command.
#[derive(Debug)]
pub(super) struct CommandInfo {
    pub(super) keys: &'static [Key],
    pub(super) action: Action,
    /// The keys as help and hints write them.
    pub(super) label: &'static str,
    /// Its word in the hint bar and its rank there: the lowest are the last to go. None: only in the help.
    pub(super) hint: Option<(&'static str, u8)>,
    /// One line for the help; empty if the line of another command covers it.
    pub(super) help: &'static str,
    /// Panes where it does something; empty means everywhere.
    pub(super) panes: &'static [Pane],
    /// Steers the engine, so that read-only refuses it.
    pub(super) steers: bool,
}

const fn key(code: KeyCode) -> Key {
    Key { code, control: false }
}

const fn char(c: char) -> Key {
    Key { code: KeyCode::Char(c), control: false }
}

const fn control(c: char) -> Key {
    Key { code: KeyCode::Char(c), control: true }
}

const fn plain(keys: &'static [Key], action: Action, label: &'static str, help: &'static str) -> CommandInfo {
    CommandInfo { keys, action, label, hint: None, help, panes: &[], steers: false }
}

impl CommandInfo {
    const fn hint(self, word: &'static str, rank: u8) -> CommandInfo {
        CommandInfo { hint: Some((word, rank)), ..self }
    }

    const fn only(self, panes: &'static [Pane]) -> CommandInfo {
        CommandInfo { panes, ..self }
    }

    const fn steers(self) -> CommandInfo {
        CommandInfo { steers: true, ..self }
    }

    /// Why it would do nothing now, in words.
    pub(super) fn refusal(&self, app: &App, status: &Status) -> Option<&'static str> {
        if self.steers && app.read_only(status) {
            return Some("read-only");
        }
        if self.steers && matches!(status.phase, Phase::Failed | Phase::Stopping | Phase::Stopped) {
            return Some("the pipeline has ended or is about to");
        }
        if self.steers && status.phase == Phase::Standby && !(self.action == Action::Pause && status.pause_requested) {
            return Some("another process leads: steer that one");
        }
        if !self.panes.is_empty() && !self.panes.contains(&app.focused()) {
            return Some(NOT_HERE);
        }
        None
    }
}

/// The reason of a command that belongs to another pane.
pub(super) const NOT_HERE: &str = "not in this pane";

const LISTS: &[Pane] = &[Pane::Tables, Pane::Chunks, Pane::Events, Pane::Errors, Pane::Log];

/// All commands, in the order of the hint bar and of the help.
pub(super) const COMMANDS: &[CommandInfo] = &[
    plain(&[char('?'), key(KeyCode::F(1))], Action::Help, "?", "this help").hint("Help", 0),
    plain(&[char('1')], Action::Show(View::Overview), "1-6", "views: Overview, Tables, Chunks, Events, Errors, Log")
        .hint("View", 1),
    plain(&[char('2')], Action::Show(View::Tables), "2", ""),
    plain(&[char('3')], Action::Show(View::Chunks), "3", ""),
    plain(&[char('4')], Action::Show(View::Events), "4", ""),
    plain(&[char('5')], Action::Show(View::Errors), "5", ""),
    plain(&[char('6')], Action::Show(View::Log), "6", ""),
    plain(&[key(KeyCode::Tab)], Action::NextPane, "Tab", "next pane; Shift-Tab: the one before").hint("Pane", 3),
    plain(&[key(KeyCode::BackTab)], Action::PreviousPane, "Shift-Tab", ""),
    plain(&[key(KeyCode::Enter)], Action::Enter, "Enter", "detail: a table's chunks, an event or an error in full")
        .hint("Detail", 3)
        .only(&[Pane::Tables, Pane::Events, Pane::Errors, Pane::Log]),
    plain(&[key(KeyCode::Esc)], Action::Back, "Esc", "close, clear the filter, unzoom, go back; never quits")
        .hint("Back", 5),
    plain(&[key(KeyCode::Up), char('k')], Action::Up, "arrows hjkl", "move; left and right choose the table in Chunks"),
    plain(&[key(KeyCode::Down), char('j')], Action::Down, "j", ""),
    plain(&[key(KeyCode::Left), char('h')], Action::Left, "h", ""),
    plain(&[key(KeyCode::Right), char('l')], Action::Right, "l", ""),
    plain(&[char('g'), key(KeyCode::Home)], Action::Top, "g G Home End", "first, last"),
    plain(&[char('G'), key(KeyCode::End)], Action::Bottom, "G", ""),
    plain(&[key(KeyCode::PageUp)], Action::PageUp, "PgUp PgDn", "one page; Ctrl-U, Ctrl-D: half a page"),
    plain(&[key(KeyCode::PageDown)], Action::PageDown, "PgDn", ""),
    plain(&[control('u')], Action::HalfUp, "Ctrl-U", ""),
    plain(&[control('d')], Action::HalfDown, "Ctrl-D", ""),
    plain(&[char('z')], Action::Zoom, "z", "zoom the pane to the whole screen, and back").hint("Zoom", 4),
    plain(&[char('/')], Action::Filter, "/", "filter the list; a leading ! keeps what does not match")
        .hint("Filter", 2)
        .only(LISTS),
    plain(&[char('s'), key(KeyCode::F(6))], Action::Sort, "s", "next order: config, name, %, row/s, ETA, errors")
        .hint("Sort", 4)
        .only(&[Pane::Tables, Pane::Chunks]),
    plain(&[char('I')], Action::Invert, "I", "turn the order round")
        .hint("Invert", 6)
        .only(&[Pane::Tables, Pane::Chunks]),
    plain(&[char('F')], Action::Follow, "F", "follow the newest line, or stay; moving down stays")
        .hint("Follow", 6)
        .only(&[Pane::Events, Pane::Log]),
    plain(&[char('t')], Action::Ages, "t", "clock times or ages").hint("Age", 7),
    plain(&[char(' ')], Action::Freeze, "Space", "freeze the panes; the header stays live").hint("Freeze", 2),
    plain(&[char('p')], Action::Pause, "p", "pause the pipeline (asks), or resume it").hint("Pause", 1).steers(),
    plain(&[char('P')], Action::PauseTable, "P", "pause the copy of the selected table (asks), or resume it")
        .hint("Pause table", 5)
        .only(&[Pane::Tables, Pane::Chunks])
        .steers(),
    plain(&[char('r')], Action::Resnapshot, "r", "copy the selected table again (asks for its name)")
        .hint("Resnapshot", 1)
        .only(&[Pane::Tables, Pane::Chunks])
        .steers(),
    plain(&[control('l')], Action::Redraw, "Ctrl-L", "draw the screen anew"),
    plain(&[control('z')], Action::Suspend, "Ctrl-Z", "does nothing: the pipeline goes on; q stops it"),
    plain(&[char('q')], Action::Quit, "q", "stop and checkpoint (asks); Ctrl-C twice within 2 s leaves at once")
        .hint("Quit", 0),
    plain(&[control('c')], Action::Interrupt, "Ctrl-C", ""),
];

/// The command of an action.
pub(super) fn info(action: Action) -> Option<&'static CommandInfo> {
    COMMANDS.iter().find(|info| info.action == action)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_has_two_commands() {
        let keys: Vec<Key> = COMMANDS.iter().flat_map(|info| info.keys).copied().collect();
        for (at, key) in keys.iter().enumerate() {
            assert!(!keys[..at].contains(key), "{key:?} has two commands");
        }
    }

    #[test]
    fn every_command_is_in_the_help_or_covered_by_its_neighbour() {
        for (at, info) in COMMANDS.iter().enumerate() {
            let covered = info.help.is_empty();
            let nearest = COMMANDS[..at].iter().rev().find(|info| !info.help.is_empty());
            assert!(!covered || nearest.is_some(), "{:?} is in no line of the help", info.action);
            assert!(!info.keys.is_empty() && !info.label.is_empty());
        }
        // Keys kept free because they mean something harmless elsewhere, or end things.
        for kept in [char('R'), control('k'), char('K'), char('x'), key(KeyCode::Delete)] {
            assert!(!COMMANDS.iter().any(|info| info.keys.contains(&kept)), "{kept:?} must stay free");
        }
    }
}
