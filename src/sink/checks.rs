//! The part of [`crate::checks`] that only this room can see.

use super::body::{Item, Kind};
use super::response::{ErrorText, Items, describe, error_of, judge, read};

/// The answer to a bulk request, whose items the first byte chooses: it is refused, or there is one answer for each
/// item; and what is told of an error is fit for a terminal.
///
/// # Panics
/// It is not so.
pub fn response(input: &[u8]) {
    let Some((&first, answer)) = input.split_first() else { return };
    let kinds = [Kind::Index, Kind::Delete, Kind::Update];
    let item =
        |at: u8| Item { start: 0, table: 0, slot: 0, kind: kinds[usize::from((first >> 3).wrapping_add(at)) % 3] };
    let sent: Vec<Item> = (0..first & 7).map(item).collect();
    if let Some(error) = error_of(answer) {
        told(400, Some(&error));
    }
    if let Ok(Items::Each(answers)) = read(answer, &sent) {
        assert_eq!(answers.len(), sent.len());
        for (answer, item) in answers.iter().zip(&sent) {
            judge(item.kind, answer.status, answer.error.as_ref());
            told(answer.status, answer.error.as_ref());
        }
    }
}

fn told(status: u16, error: Option<&ErrorText<'_>>) {
    let text = describe(status, error);
    assert!(!text.contains(char::is_control), "{text:?}");
}
