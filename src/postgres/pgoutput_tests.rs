#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// A message put together from numbers in network order, names and bytes.
#[derive(Default)]
struct Build(Vec<u8>);

impl Build {
    fn new(message: u8) -> Self {
        Build(vec![message])
    }
    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }
    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }
    fn name(mut self, value: &str) -> Self {
        self.0.extend(value.as_bytes());
        self.u8(0)
    }
    fn tuple(mut self, fields: &[Field<'_>]) -> Self {
        self = self.u16(u16::try_from(fields.len()).unwrap());
        for field in fields {
            self = match field {
                Field::Null => self.u8(b'n'),
                Field::Unchanged => self.u8(b'u'),
                Field::Text(text) => {
                    self = self.u8(b't').u32(u32::try_from(text.len()).unwrap());
                    self.0.extend(*text);
                    self
                }
            };
        }
        self
    }
}

const ROW: [Field<'static>; 4] = [Field::Text(b"7"), Field::Null, Field::Unchanged, Field::Text(b"")];

fn samples() -> Vec<Vec<u8>> {
    [
        Build::new(b'B').u64(0x16_B374_D848).u64(1_000_000).u32(731),
        Build::new(b'C').u8(0).u64(1).u64(2).u64(3),
        Build::new(b'R')
            .u32(16_384)
            .name("public")
            .name("users")
            .u8(b'd')
            .u16(2)
            .u8(1)
            .name("id")
            .u32(20)
            .u32(u32::MAX)
            .u8(0)
            .name("name")
            .u32(25)
            .u32(36),
        Build::new(b'I').u32(16_384).u8(b'N').tuple(&ROW),
        Build::new(b'U').u32(16_384).u8(b'N').tuple(&ROW),
        Build::new(b'U').u32(16_384).u8(b'K').tuple(&ROW[..2]).u8(b'N').tuple(&ROW),
        Build::new(b'U').u32(16_384).u8(b'O').tuple(&ROW).u8(b'N').tuple(&ROW),
        Build::new(b'D').u32(16_384).u8(b'O').tuple(&ROW),
        Build::new(b'T').u32(2).u8(3).u32(11).u32(12),
        Build::new(b'Y').u32(99).name("").name("mood"),
        Build::new(b'O').u64(5).name("elsewhere"),
        Build::new(b'M').u8(1).u64(5).name("pre").u32(2).u8(1).u8(0),
    ]
    .into_iter()
    .map(|build| build.0)
    .collect()
}

fn fields<'a>(tuple: &Tuple<'a>) -> Vec<Field<'a>> {
    let mut left = tuple.iter();
    for count in (0..tuple.len()).rev() {
        assert!(left.next().is_some());
        assert_eq!(left.len(), count);
    }
    assert_eq!(left.next(), None);
    assert_eq!(tuple.has_unchanged(), tuple.iter().any(|field| field == Field::Unchanged));
    tuple.iter().collect()
}

#[test]
fn every_message_is_read() {
    let samples = samples();
    let all: Vec<Message<'_>> = samples.iter().map(|bytes| decode(bytes).unwrap()).collect();
    let begin = Message::Begin { final_lsn: Lsn(0x16_B374_D848), commit_time: POSTGRES_EPOCH + 1_000_000, xid: 731 };
    assert_eq!(all[0], begin);
    assert_eq!(all[1], Message::Commit { commit_lsn: Lsn(1), end_lsn: Lsn(2), commit_time: POSTGRES_EPOCH + 3 });
    let Message::Relation(relation) = &all[2] else { panic!("{:?}", all[2]) };
    assert_eq!(
        (relation.oid, relation.schema, relation.name, relation.replica_identity),
        (16_384, "public", "users", b'd')
    );
    let id = RelationColumn { key: true, name: "id", type_oid: 20, type_modifier: -1 };
    assert_eq!(relation.columns, [id, RelationColumn { key: false, name: "name", type_oid: 25, type_modifier: 36 }]);
    assert!(matches!(&all[3], Message::Insert { oid: 16_384, new } if fields(new) == ROW));
    assert!(matches!(&all[4], Message::Update { old: None, new, .. } if fields(new) == ROW));
    let Message::Update { old: Some((Old::Key, key)), new, .. } = &all[5] else { panic!("{:?}", all[5]) };
    assert_eq!((fields(key), fields(new)), (ROW[..2].to_vec(), ROW.to_vec()));
    assert!(matches!(&all[6], Message::Update { old: Some((Old::Full, old)), .. } if fields(old) == ROW));
    assert!(matches!(&all[7], Message::Delete { kind: Old::Full, old, .. } if fields(old) == ROW));
    let Message::Truncate { oids, cascade: true, restart_identity: true } = &all[8] else { panic!("{:?}", all[8]) };
    assert_eq!(oids.iter().collect::<Vec<_>>(), [11, 12]);
    assert_eq!(all[9], Message::Type { oid: 99, schema: "pg_catalog", name: "mood" });
    assert_eq!(all[10], Message::Origin { commit_lsn: Lsn(5), name: "elsewhere" });
    assert_eq!(all[11], Message::Logical { transactional: true, lsn: Lsn(5), prefix: "pre", content: &[1, 0] });
}

#[test]
fn cut_and_lengthened_messages_are_refused() {
    for sample in samples() {
        for end in 0..sample.len() {
            assert!(decode(&sample[..end]).is_err(), "{} of {} bytes passed", end, sample.len());
        }
        let mut longer = sample.clone();
        longer.push(b'n');
        assert!(decode(&longer).is_err(), "{longer:?}");
    }
}

#[test]
fn errors_say_what_came() {
    assert_eq!(decode(b"").unwrap_err().to_string(), "an empty replication message came");
    assert_eq!(decode(b"S123").unwrap_err().to_string(), "a replication message of the unknown type S came");
    assert_eq!(decode(b"\x1b[2J").unwrap_err().to_string(), "a replication message of the unknown type \\u{1b} came");
    let binary = Build::new(b'I').u32(1).u8(b'N').u16(1).u8(b'b').u32(1).u8(0).0;
    let text = "a replication message of the type I is malformed: a field is in binary form";
    assert_eq!(decode(&binary).unwrap_err().to_string(), text);
}

#[test]
fn logs_of_a_tuple_hold_no_value() {
    let secret = Build::new(b'I').u32(1).u8(b'N').tuple(&[Field::Text(b"secret")]).0;
    assert!(!format!("{:?}", decode(&secret).unwrap()).contains("115"), "bytes of the value are shown");
}

#[test]
fn times_become_moments() {
    assert_eq!(system_time(1_500_000), UNIX_EPOCH + Duration::from_millis(1500));
    assert_eq!(system_time(-1), UNIX_EPOCH - Duration::from_micros(1));
    let _ = (system_time(i64::MIN), system_time(i64::MAX));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..60), message in prop::sample::select(b"BCRIUDTYOM".to_vec())) {
        let mut framed = vec![message];
        framed.extend(&bytes);
        for bytes in [&bytes, &framed] {
            if let Ok(message) = decode(bytes) {
                visit(&message);
            }
        }
    }

    #[test]
    fn no_change_to_a_message_panics(which in 0..12_usize, at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut sample = samples().swap_remove(which);
        let at = at.index(sample.len());
        sample[at] = byte;
        if let Ok(message) = decode(&sample) {
            visit(&message);
        }
    }
}

fn visit(message: &Message<'_>) {
    match message {
        Message::Insert { new, .. } => assert_eq!(fields(new).len(), new.len()),
        Message::Update { old, new, .. } => {
            assert_eq!(fields(new).len(), new.len());
            if let Some((_, old)) = old {
                assert_eq!(fields(old).len(), old.len());
            }
        }
        Message::Delete { old, .. } => assert_eq!(fields(old).len(), old.len()),
        Message::Truncate { oids, .. } => assert_eq!(oids.iter().count(), oids.iter().len()),
        _ => {}
    }
}
