//! How fast a row's text becomes a line of a bulk body, on one core: `cargo bench --bench encoder`.
//!
//! A line of COPY is split, its id written, each field turned into JSON, all of it into one body; and the same from a
//! message of the stream. Bytes are those that PostgreSQL sends. Nothing is sent on, nothing is read from anywhere.
//!
//! Seconds are the thread's own on the processor, so that others who want it too do not count; what they do to the caches
//! does. The machine's noise is the spread of the rounds; beside them, in the same run, how fast memory is copied (`memcpy`).

#![allow(clippy::print_stdout, clippy::cast_precision_loss, reason = "its figures are its output")]

use std::error::Error;
use std::hint::black_box;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use pgtide::change::Field;
use pgtide::mapping::{Shape, write_row};
use pgtide::postgres::pgoutput::{Message, decode};
use pgtide::sink::{Body, Target};
use pgtide::table::Column;
use pgtide::text::copy::Splitter;

type Outcome<T> = Result<T, Box<dyn Error>>;

const ROUNDS: usize = 15;
/// Bytes of rows that a round encodes.
const ROUND: usize = 256 << 20;
/// As `elasticsearch.batchByteSizeLimit`.
const BODY: usize = 5 << 20;

/// Rows of one table, as PostgreSQL sends them.
struct Rows {
    name: &'static str,
    shape: Shape,
    lines: Vec<Vec<u8>>,
    messages: Vec<Vec<u8>>,
}

fn main() -> Outcome<()> {
    println!("load {}", std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    for rows in [text_heavy(), small_columns()] {
        let bytes: usize = rows.lines.iter().map(Vec::len).sum();
        println!("\n{}: {} bytes a row", rows.name, bytes / rows.lines.len());
        let copied = memory(bytes)?;
        report("memcpy", &copied);
        report("COPY", &copy(&rows)?);
        report("stream", &stream(&rows)?);
    }
    println!("\nload {}", std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    Ok(())
}

/// Articles: four texts of some hundred to some thousand bytes with line breaks and quotes, as COPY escapes them.
fn text_heavy() -> Rows {
    let prose = "The tide comes in twice a day, and twice a day it goes. What it brings, nobody ordered; what it takes, \
                 nobody signed for. Die Flut kommt zweimal am Tag \u{2014} sie fragt nicht, ob es pa\u{df}t.";
    let quote = "She said \"wait\" and waited.\n";
    let types = [20, 25, 25, 25, 25, 1184];
    let row = |at: usize| {
        vec![
            (at * 7919).to_string(),
            prose[..80].to_owned(),
            prose.repeat(3 + at % 3),
            format!("{}{quote}", prose.repeat(12 + at % 7)),
            prose.repeat(2),
            "2024-05-17 10:20:30.123456+00".to_owned(),
        ]
    };
    rows("text-heavy rows", &types, row)
}

/// Orders: 20 columns of numbers, short words, times, switches.
fn small_columns() -> Rows {
    let types = [20, 23, 21, 16, 1043, 25, 1184, 1082, 1700, 701, 2950, 23, 23, 16, 1043, 1114, 20, 1700, 25, 23];
    let row = |at: usize| {
        let word = ["open", "paid", "sent to \u{d6}rebro", "back"][at % 4];
        vec![
            (100_000_000 + at * 7919).to_string(),
            (at * 31 % 99_991).to_string(),
            (at % 300).to_string(),
            ["t", "f"][at % 2].to_owned(),
            format!("user{at}@example.com"),
            word.to_owned(),
            format!("2024-05-17 10:{:02}:30.123456+00", at % 60),
            "2024-05-18".to_owned(),
            format!("{}.{:02}", at * 13 % 10_000, at % 100),
            format!("{}.5", at % 1000),
            format!("a0eebc99-9c0b-4ef8-bb6d-6bb9bd3{:05x}", at % 0xF_FFFF),
            (at % 7).to_string(),
            (at % 17).to_string(),
            ["f", "t"][at % 2].to_owned(),
            ["EUR", "SEK"][at % 2].to_owned(),
            "2024-05-17 10:20:30".to_owned(),
            (at * 104_729).to_string(),
            "19.00".to_owned(),
            "web shop".to_owned(),
            "0".to_owned(),
        ]
    };
    rows("rows of 20 small columns", &types, row)
}

fn rows(name: &'static str, types: &[u32], row: impl Fn(usize) -> Vec<String>) -> Rows {
    let column =
        |(at, type_oid): (usize, &u32)| Column { name: format!("column_{at}"), type_oid: *type_oid, key: at == 0 };
    let shape = Shape::new(types.iter().enumerate().map(column).collect());
    let (mut lines, mut messages) = (Vec::new(), Vec::new());
    // More than the caches hold.
    while lines.iter().map(Vec::len).sum::<usize>() < 32 << 20 {
        for at in lines.len()..lines.len() + 1000 {
            let fields = row(at);
            let escaped: Vec<String> = fields
                .iter()
                .map(|field| field.replace('\\', "\\\\").replace('\n', "\\n").replace('\t', "\\t"))
                .collect();
            lines.push(format!("{}\n", escaped.join("\t")).into_bytes());
            messages.push(insert(&fields));
        }
    }
    Rows { name, shape, lines, messages }
}

/// The message of an INSERT by the protocol's definition.
fn insert(fields: &[String]) -> Vec<u8> {
    let mut message = b"I".to_vec();
    message.extend_from_slice(&16_384_u32.to_be_bytes());
    message.push(b'N');
    message.extend_from_slice(&u16::try_from(fields.len()).unwrap_or(u16::MAX).to_be_bytes());
    for field in fields {
        message.push(b't');
        message.extend_from_slice(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
        message.extend_from_slice(field.as_bytes());
    }
    message
}

fn copy(rows: &Rows) -> Outcome<Vec<f64>> {
    let mut splitter = Splitter::default();
    rounds(&rows.lines, rows, |writer, line| writer.row(splitter.split(line).iter()))
}

fn stream(rows: &Rows) -> Outcome<Vec<f64>> {
    rounds(&rows.messages, rows, |writer, message| match decode(message)? {
        Message::Insert { new, .. } => writer.row(new.iter()),
        _ => Err("not the message that was made".into()),
    })
}

/// Into one body, as a worker of the copy does.
struct Writer<'a> {
    shape: &'a Shape,
    target: Target,
    body: Body,
    id: Vec<u8>,
}

impl Writer<'_> {
    fn row<'a>(&mut self, fields: impl Iterator<Item = Field<'a>> + Clone) -> Outcome<()> {
        if !self.shape.id(&mut self.id, fields.clone()) {
            return Err("a row without a key".into());
        }
        Ok(write_row(&mut self.body, &self.target, self.shape, &self.id, 1_234_567_890_123, fields)?)
    }
}

/// Bytes a second of each round.
fn rounds(
    inputs: &[Vec<u8>],
    rows: &Rows,
    mut encode: impl FnMut(&mut Writer<'_>, &[u8]) -> Outcome<()>,
) -> Outcome<Vec<f64>> {
    let body = Body::with_capacity(2 * BODY);
    let mut writer = Writer { shape: &rows.shape, target: Target::new("rows", 0), body, id: Vec::new() };
    let mut figures = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let (mut bytes, began) = (0, on_processor()?);
        for input in inputs.iter().cycle() {
            encode(&mut writer, input)?;
            bytes += input.len();
            if writer.body.bytes() >= BODY {
                black_box(writer.body.as_bytes());
                // Emptied in its buffer, which a sink keeps for the next body.
                while !writer.body.is_empty() {
                    writer.body.truncate_last();
                }
                if bytes >= ROUND {
                    break;
                }
            }
        }
        figures.push(bytes as f64 / (on_processor()? - began).as_secs_f64());
    }
    Ok(figures)
}

/// What a copy of as many bytes takes.
fn memory(bytes: usize) -> Outcome<Vec<f64>> {
    let from = vec![7_u8; bytes];
    let mut to = vec![0_u8; BODY];
    let mut figures = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let (mut copied, began) = (0, on_processor()?);
        while copied < ROUND {
            for part in from.chunks_exact(BODY) {
                to.copy_from_slice(black_box(part));
                black_box(&to);
                copied += part.len();
            }
        }
        figures.push(copied as f64 / (on_processor()? - began).as_secs_f64());
    }
    Ok(figures)
}

/// How long this thread has had a processor.
fn on_processor() -> Outcome<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

fn report(what: &str, figures: &[f64]) {
    let mut figures: Vec<f64> = figures.iter().map(|figure| figure / 1e6).collect();
    figures.sort_by(f64::total_cmp);
    let (lowest, middle, highest) = (figures[0], figures[figures.len() / 2], figures[figures.len() - 1]);
    println!("  {what:<7} median {middle:>6.0} MB/s   lowest {lowest:>6.0}   highest {highest:>6.0}");
}
