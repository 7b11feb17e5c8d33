use std::collections::HashSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::lsn::Lsn;
use crate::sink::{DeadLetters, Letter, dead_letter};
use crate::version;

fn line(id: &str) -> Vec<u8> {
    let mut line = Vec::new();
    let at = version::of(Lsn(0x16_B378), 3);
    let action =
        format!(r#"{{"index":{{"_index":"users","_id":"{id}","version":{at},"version_type":"external_gte"}}}}"#);
    let reason = "failed to parse field [n] of type [long] in document with id '7'. Preview of field's value: 'SECRET'";
    let document = Some(&br#"{"n":1.50}"#[..]);
    dead_letter::write_line(
        &mut line,
        "public.users",
        400,
        "mapper_parsing_exception",
        reason,
        action.as_bytes(),
        document,
    );
    line
}

fn letters(path: &Path) -> (Vec<Letter>, u64) {
    let mut found = Vec::new();
    let others = DeadLetters::new(path.to_owned()).read(|letter| found.push(letter)).unwrap();
    (found, others)
}

fn ids(path: &Path) -> Vec<String> {
    letters(path).0.into_iter().map(|letter| letter.id).collect()
}

#[tokio::test]
async fn a_letter_is_read_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dead");
    assert_eq!(letters(&path).1, 0, "a file that is not there has none");
    DeadLetters::new(path.clone()).append(Arc::new(line("7"))).await.unwrap();
    // As an earlier version wrote it, of a handler's script, and what is none.
    let old = r#"{"time":"t","table":3,"status":413,"type":"","reason":"","action":{"update":{"_index":"i","_id":"x","routing":"r"}}}"#;
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{text}{old}\nno letter\n{{\"half")).unwrap();
    let (found, others) = letters(&path);
    assert_eq!((found.len(), others), (2, 2));
    let letter = &found[0];
    assert_eq!(
        (letter.table.as_deref(), letter.operation, letter.index.as_str()),
        (Some("public.users"), "index", "users")
    );
    assert_eq!(letter.position(), Some(Lsn(0x16_B378)));
    assert_eq!(letter.document.as_ref().unwrap().get(), r#"{"n":1.50}"#);
    assert!(letter.reason.contains("SECRET"));
    assert_eq!(letter.answer(), "400 mapper_parsing_exception: failed to parse field [n] of type [long]");
    let old = &found[1];
    assert_eq!((old.table.as_deref(), old.operation, old.routing.as_deref()), (None, "update", Some("r")));
    assert_eq!((old.position(), old.answer()), (None, "413".to_owned()));
}

#[tokio::test]
async fn letters_leave_the_file_alone_and_all_else_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dead");
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let file = DeadLetters::new(link.clone());
    assert_eq!(file.remove(&HashSet::new()).unwrap(), 0, "there is none yet");
    for id in ["1", "2", "3"] {
        file.append(Arc::new(line(id))).await.unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    // What an earlier removal left when it was killed, and a last line that somebody's editor left open.
    std::fs::write(folder.path().join("dead.new"), "half").unwrap();
    std::fs::write(&path, format!("no letter\n{}", text.trim_end())).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let owner = std::fs::metadata(&path).unwrap().uid();
    let marks: HashSet<_> = letters(&path).0.into_iter().filter(|letter| letter.id == "2").map(|it| it.mark).collect();
    assert_eq!(file.remove(&marks).unwrap(), 1);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("no letter\n{}\n{}\n", lines[0], lines[2]));
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!((metadata.permissions().mode() & 0o777, metadata.uid()), (0o640, owner));
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(!folder.path().join("dead.new").exists());
    // The one that is open still appends to the file of that name.
    file.append(Arc::new(line("4"))).await.unwrap();
    assert_eq!(ids(&path), ["1", "3", "4"]);
}

/// Two that append, each with the file open, while a third takes letters out all the time: each letter is in the file, or was
/// taken out, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_where_some_append_and_some_remove() {
    const EACH: usize = 150;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dead");
    let writers = ["a", "b"].map(|name| {
        let path = path.clone();
        tokio::spawn(async move {
            let file = DeadLetters::new(path);
            for number in 0..EACH {
                file.append(Arc::new(line(&format!("{name}{number}")))).await.unwrap();
            }
        })
    });
    let ended = Arc::new(AtomicBool::new(false));
    let remover = tokio::task::spawn_blocking({
        let (path, ended) = (path.clone(), Arc::clone(&ended));
        move || {
            let (mut removed, mut count) = (Vec::new(), 0);
            while !ended.load(Ordering::Relaxed) {
                let odd = |letter: &Letter| letter.id.ends_with(['1', '3', '5', '7', '9']);
                let chosen: Vec<_> = letters(&path).0.into_iter().filter(odd).collect();
                let marks = chosen.iter().map(|letter| letter.mark).collect();
                count += DeadLetters::new(path.clone()).remove(&marks).unwrap();
                removed.extend(chosen.into_iter().map(|letter| letter.id));
            }
            assert_eq!(count, removed.len() as u64, "one went twice, or did not go");
            removed
        }
    });
    for writer in writers {
        writer.await.unwrap();
    }
    ended.store(true, Ordering::Relaxed);
    let removed = remover.await.unwrap();
    assert!(removed.len() > 10, "only {} were taken out while others wrote", removed.len());
    let mut all: Vec<String> = ids(&path).into_iter().chain(removed).collect();
    all.sort();
    let mut expected: Vec<String> =
        ["a", "b"].iter().flat_map(|name| (0..EACH).map(move |number| format!("{name}{number}"))).collect();
    expected.sort();
    assert_eq!(all, expected);
}
