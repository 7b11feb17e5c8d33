//! From key to [`Action`].

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::app::{App, Dialog};
use super::command::{Action, COMMANDS, Key};

/// What `event` asks for, given what takes the keys. Releases ask for nothing; a key held down only moves.
pub(super) fn action(app: &App, event: KeyEvent) -> Option<Action> {
    let repeat = match event.kind {
        KeyEventKind::Press => false,
        KeyEventKind::Repeat => true,
        KeyEventKind::Release => return None,
    };
    let control = event.modifiers.contains(KeyModifiers::CONTROL);
    if event.modifiers.intersects(KeyModifiers::ALT | KeyModifiers::SUPER | KeyModifiers::META | KeyModifiers::HYPER) {
        return None;
    }
    let found = COMMANDS
        .iter()
        .find(|info| info.keys.contains(&Key { code: event.code, control }))
        .map(|info| info.action)
        .filter(|action| !repeat || moves(*action));
    if matches!(found, Some(Action::Interrupt | Action::Redraw | Action::Suspend)) {
        return found;
    }
    match &app.dialog {
        Some(Dialog::Ask { .. }) if repeat => None,
        Some(Dialog::Ask { .. }) => Some(match event.code {
            KeyCode::Char('y' | 'Y') if !control => Action::Yes,
            _ => Action::No,
        }),
        Some(Dialog::Filter { .. } | Dialog::Resnapshot { .. }) => match event.code {
            KeyCode::Char(c) if !control => Some(Action::Type(c)),
            KeyCode::Backspace => Some(Action::Erase),
            _ => found,
        },
        _ => found,
    }
}

fn moves(action: Action) -> bool {
    matches!(
        action,
        Action::Up
            | Action::Down
            | Action::Left
            | Action::Right
            | Action::PageUp
            | Action::PageDown
            | Action::HalfUp
            | Action::HalfDown
    )
}
