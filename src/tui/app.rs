//! What the screen remembers between frames: views, selections, filters, dialogs and requests. No engine state lives here.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::engine::{Answer, Command, EventKind, Level, Phase, Status, TableState, TableStatus};
use crate::problem::Problem;
use crate::table::TableId;

use super::Options;
use super::format;
use super::history::History;
use super::style::Theme;
use super::text;

/// What fills the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum View {
    Overview,
    Tables,
    Chunks,
    Events,
    Errors,
    Log,
}

/// A part of the screen that can have the focus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pane {
    Tables,
    Replication,
    Chunks,
    Sink,
    Events,
    Errors,
    Log,
}

/// The order of the table list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    Config,
    Name,
    Progress,
    Rate,
    Eta,
    Errors,
}

impl Sort {
    /// The word of the pane's title.
    pub(super) fn word(self) -> &'static str {
        match self {
            Sort::Config => "config",
            Sort::Name => "name",
            Sort::Progress => "%",
            Sort::Rate => "row/s",
            Sort::Eta => "ETA",
            Sort::Errors => "errors",
        }
    }

    /// The next one round.
    pub(super) fn next(self) -> Sort {
        match self {
            Sort::Config => Sort::Name,
            Sort::Name => Sort::Progress,
            Sort::Progress => Sort::Rate,
            Sort::Rate => Sort::Eta,
            Sort::Eta => Sort::Errors,
            Sort::Errors => Sort::Config,
        }
    }
}

/// A substring that lines must hold, whatever its case; after a `!`, must not hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filter(pub(super) String);

impl Filter {
    /// Whether a line made of `parts` stays.
    pub(super) fn keeps(&self, parts: &[&str]) -> bool {
        let (wanted, invert) = match self.0.strip_prefix('!') {
            Some(rest) => (rest, true),
            None => (self.0.as_str(), false),
        };
        if wanted.is_empty() {
            return true;
        }
        let wanted = wanted.to_lowercase();
        parts.iter().any(|part| part.to_lowercase().contains(&wanted)) != invert
    }

    /// Nothing is filtered.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The word of the pane's title.
    pub(super) fn word(&self) -> String {
        if self.is_empty() { "none".to_owned() } else { text::cut(&text::clean(&self.0), 16) }
    }
}

/// A list's cursor and window. The selection is a key, never a row number: a list that re-sorts moves under it.
#[derive(Debug)]
pub(super) struct List<K> {
    pub(super) selected: Option<K>,
    pub(super) offset: usize,
    /// Rows that the last frame had room for.
    pub(super) height: usize,
    pub(super) filter: Filter,
    /// The newest line stays in sight; for lists whose newest is on top.
    pub(super) follow: bool,
}

impl<K> List<K> {
    fn new(follow: bool) -> Self {
        Self { selected: None, offset: 0, height: 1, filter: Filter::default(), follow }
    }

    /// Moves the window so that `at` is in it, for `rows` rows of `len` lines, and gives its first line.
    pub(super) fn window(&mut self, at: usize, len: usize, rows: usize) -> usize {
        self.height = rows.max(1);
        let last = len.saturating_sub(self.height);
        self.offset = self.offset.min(at).max((at + 1).saturating_sub(self.height)).min(last);
        self.offset
    }
}

/// What lies above the panes and takes the keys.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Dialog {
    /// Stop and checkpoint, or not.
    Quit { stop: bool },
    /// The list of keys.
    Help { scroll: usize },
    /// One thing in full: label and text.
    Detail { title: String, lines: Vec<(String, String)>, scroll: usize },
    /// The table whose name must be typed. It stays the same when the list re-sorts underneath.
    Resnapshot { table: TableId, typed: String, go: bool, wrong: bool },
    /// One line that `y` answers.
    Ask { question: String, command: Command },
    /// The filter of a pane is being typed; `before` comes back on Esc.
    Filter { pane: Pane, before: Filter },
}

/// Something asked of the engine that has not become true yet.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: Command,
    /// None once the engine has taken it.
    pub(super) answer: Option<oneshot::Receiver<Answer>>,
    pub(super) since: Duration,
    /// For a resnapshot: how many of that table had ended when it was asked for.
    ended: u64,
}

/// One line for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) text: String,
    pub(super) bad: bool,
    pub(super) since: Duration,
}

/// Why the loop ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leave {
    /// The engine has ended, or there is none to wait for.
    Ended,
    /// The operator does not want to wait.
    Forced,
}

/// A line of the errors pane.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ErrorLine {
    /// Names the line for selection.
    pub(super) key: String,
    pub(super) count: Option<u64>,
    pub(super) what: String,
    pub(super) reason: String,
    pub(super) hint: String,
    pub(super) first: Option<i64>,
    pub(super) last: Option<i64>,
    pub(super) last_id: String,
}

/// How long a message stays.
const MESSAGE: Duration = Duration::from_secs(12);
/// How long a request that was taken may take to become true before the screen stops promising it.
const REQUEST: Duration = Duration::from_secs(60);

/// The view state of the dashboard.
#[derive(Debug)]
pub struct App {
    pub(super) theme: Theme,
    pub(super) name: String,
    pub(super) log_path: Option<PathBuf>,
    read_only: bool,
    /// Monotonic time since the screen started; decides what has grown old.
    pub(super) clock: Duration,
    pub(super) view: View,
    pub(super) back: Vec<View>,
    pub(super) focus: Pane,
    pub(super) zoom: Option<Pane>,
    /// The panes of the last frame, in the order of Tab.
    pub(super) panes: Vec<Pane>,
    pub(super) tables: List<TableId>,
    pub(super) events: List<u64>,
    pub(super) errors: List<String>,
    pub(super) log: List<u64>,
    pub(super) sort: Sort,
    pub(super) inverted: bool,
    pub(super) ages: bool,
    pub(super) dialog: Option<Dialog>,
    /// What the panes show while the view is frozen; the header stays live.
    pub(super) frozen: Option<Box<Status>>,
    pub(super) requests: Vec<Request>,
    pub(super) message: Option<Message>,
    /// When Ctrl-C came last.
    pub(super) interrupted: Option<Duration>,
    /// A stop was asked for.
    pub(super) stopping: Option<Duration>,
    pub(super) leave: Option<Leave>,
    pub(super) redraw: bool,
    /// The box over a failed pipeline was closed.
    pub(super) failure_seen: bool,
    /// Another thread panicked: where.
    pub(super) panic: Option<String>,
    pub(super) lag: History,
    pub(super) bulk: History,
    rates: HashMap<TableId, History>,
    observed: Option<i64>,
}

impl App {
    /// A screen as it is at the start.
    #[must_use]
    pub fn new(options: &Options) -> App {
        App {
            theme: Theme::choose(options.color, options.ascii),
            name: text::clean(&options.name),
            log_path: options.log_path.clone(),
            read_only: options.read_only,
            clock: Duration::ZERO,
            view: View::Overview,
            back: Vec::new(),
            focus: Pane::Tables,
            zoom: None,
            panes: vec![Pane::Tables],
            tables: List::new(false),
            events: List::new(true),
            errors: List::new(false),
            log: List::new(true),
            sort: Sort::Config,
            inverted: false,
            ages: false,
            dialog: None,
            frozen: None,
            requests: Vec::new(),
            message: None,
            interrupted: None,
            stopping: None,
            leave: None,
            redraw: false,
            failure_seen: false,
            panic: None,
            lag: History::new(5, 120),
            bulk: History::new(5, 120),
            rates: HashMap::new(),
            observed: None,
        }
    }

    /// Adds `status` to the histories, drops what has grown old and settles requests that have become true.
    /// To be called once per status, before it is drawn.
    pub fn observe(&mut self, status: &Status) {
        if self.observed != Some(status.at) {
            self.observed = Some(status.at);
            self.lag.push(status.at, status.replication.lag_bytes.map(format::as_f64));
            let bulk = status.sink.last_latency.or_else(|| status.sink.latency.map(|latency| latency.p50));
            self.bulk.push(status.at, bulk);
            for table in &status.tables {
                if !self.rates.contains_key(&table.table.0) {
                    self.rates.insert(table.table.0.clone(), History::new(10, 14));
                }
                if let Some(rates) = self.rates.get_mut(&table.table.0) {
                    rates.push(status.at, (table.state != TableState::Queued).then_some(table.rows_per_second));
                }
            }
        }
        if self.message.as_ref().is_some_and(|message| self.clock.saturating_sub(message.since) > MESSAGE) {
            self.message = None;
        }
        self.settle(status);
    }

    /// Takes the answers that have come, and forgets the requests that have become true.
    pub(super) fn settle(&mut self, status: &Status) {
        let mut requests = std::mem::take(&mut self.requests);
        requests.retain_mut(|request| {
            if let Some(receiver) = &mut request.answer {
                match receiver.try_recv() {
                    Ok(Ok(())) => request.answer = None,
                    Ok(Err(refusal)) => {
                        self.say(
                            format!("{} refused: {}", request_name(&request.command), text::clean(&refusal)),
                            true,
                        );
                        if request.command == Command::Stop {
                            self.stopping = None;
                        }
                        return false;
                    }
                    Err(oneshot::error::TryRecvError::Empty) => return true,
                    Err(oneshot::error::TryRecvError::Closed) => {
                        self.engine_gone(&request.command);
                        return false;
                    }
                }
            }
            if request.command == Command::Stop {
                return true;
            }
            let late = self.clock.saturating_sub(request.since) > REQUEST;
            if late && !is_true(request, status) {
                let name = request_name(&request.command);
                self.say(format!("{name} was taken 60 s ago and has not happened yet: see the log, press 6"), true);
            }
            !late && !is_true(request, status)
        });
        self.requests.append(&mut requests);
    }

    /// Remembers that `command` is on its way; `status` is what was so before.
    pub(super) fn track(&mut self, command: Command, sent: Result<oneshot::Receiver<Answer>, String>, status: &Status) {
        match sent {
            Ok(receiver) => {
                let ended = match &command {
                    Command::Resnapshot(id) => table(status, id).map_or(0, |table| table.resnapshots_ended),
                    _ => 0,
                };
                self.requests.push(Request { command, answer: Some(receiver), since: self.clock, ended });
            }
            Err(refusal) => self.say(format!("{} refused: {refusal}", request_name(&command)), true),
        }
    }

    /// The engine does not answer any more.
    pub(super) fn engine_gone(&mut self, command: &Command) {
        if *command == Command::Stop {
            self.leave = Some(Leave::Ended);
        } else {
            self.say(format!("{} refused: the engine has ended", request_name(command)), true);
        }
    }

    /// Shows `text` for a while.
    pub(super) fn say(&mut self, text: String, bad: bool) {
        self.message = Some(Message { text, bad, since: self.clock });
    }

    /// Control commands are refused, by us or by the engine.
    pub(super) fn read_only(&self, status: &Status) -> bool {
        self.read_only || status.read_only
    }

    /// The pane that has the screen for itself, if one has.
    pub(super) fn single(&self) -> Option<Pane> {
        self.zoom.or(match self.view {
            View::Overview => None,
            View::Tables => Some(Pane::Tables),
            View::Chunks => Some(Pane::Chunks),
            View::Events => Some(Pane::Events),
            View::Errors => Some(Pane::Errors),
            View::Log => Some(Pane::Log),
        })
    }

    /// The pane that the keys go to.
    pub(super) fn focused(&self) -> Pane {
        self.single().unwrap_or(self.focus)
    }

    /// The table list: positions in `status.tables`, filtered and in order.
    pub(super) fn table_order(&self, status: &Status) -> Vec<usize> {
        let tables = &status.tables;
        let keeps = |table: &TableStatus| {
            let filter = &self.tables.filter;
            filter.is_empty() || filter.keeps(&[&table.table.0.to_string(), &table.index, table.state.word()])
        };
        let mut order: Vec<usize> = (0..tables.len()).filter(|&at| keeps(&tables[at])).collect();
        // What has most of it comes first, except names and times, where the least does.
        match self.sort {
            Sort::Config => {}
            Sort::Name => order.sort_by_cached_key(|&at| tables[at].table.clone()),
            Sort::Progress => {
                // Counts chunks: once for a table, not once for a comparison.
                let shares: Vec<f64> = tables.iter().map(|table| table.progress().unwrap_or(-1.0)).collect();
                order.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]));
            }
            Sort::Rate => order.sort_by(|&a, &b| tables[b].rows_per_second.total_cmp(&tables[a].rows_per_second)),
            Sort::Eta => order.sort_by_key(|&at| std::cmp::Reverse(tables[at].eta)),
            Sort::Errors => order.sort_by_key(|&at| std::cmp::Reverse(tables[at].errors)),
        }
        if self.inverted {
            order.reverse();
        }
        order
    }

    /// The selected table's position in `status.tables`: the one chosen if the list shows it, else the first one shown.
    pub(super) fn selected_table(&self, status: &Status) -> Option<usize> {
        let order = self.table_order(status);
        let chosen = |&at: &usize| Some(&status.tables[at].table.0) == self.tables.selected.as_ref();
        order.iter().copied().find(chosen).or_else(|| order.first().copied())
    }

    /// The event list: positions in `status.events`, filtered, newest first.
    pub(super) fn event_order(&self, status: &Status) -> Vec<usize> {
        let filter = &self.events.filter;
        let keeps = |at: &usize| {
            let event = &status.events[*at];
            filter.is_empty()
                || filter.keeps(&[event_word(event.kind), &event_table(status, event.table), &event.key, &event.detail])
        };
        (0..status.events.len()).rev().filter(keeps).collect()
    }

    /// The log: positions in `status.notices`, filtered, newest first.
    pub(super) fn log_order(&self, status: &Status) -> Vec<usize> {
        let keeps = |at: &usize| {
            let notice = &status.notices[*at];
            self.log.filter.keeps(&[level_word(notice.level), &notice.text])
        };
        (0..status.notices.len()).rev().filter(keeps).collect()
    }

    /// Everything that somebody may have to mend, filtered: the pipeline, the sink, tables, rejected documents.
    pub(super) fn error_lines(&self, status: &Status) -> Vec<ErrorLine> {
        let mut lines = Vec::new();
        let mut add = |line: ErrorLine| {
            if self.errors.filter.keeps(&[&line.what, &line.reason]) {
                lines.push(line);
            }
        };
        let line = |key: String, what: &str, reason: &str, hint: &str| ErrorLine {
            key,
            count: None,
            what: what.to_owned(),
            reason: reason.to_owned(),
            hint: hint.to_owned(),
            first: None,
            last: None,
            last_id: String::new(),
        };
        // A sink in trouble is also the pipeline's problem, in the same words: once is enough.
        let told =
            |problem: &&Problem| status.sink.trouble.as_ref().is_none_or(|trouble| trouble.reason != problem.message);
        if let Some(problem) = status.problem.as_ref().filter(told) {
            let mut line = line("pipeline".to_owned(), "(pipeline)", &problem.message, &problem.hint);
            line.first = Some(status.phase_since);
            line.count = (status.attempts > 0).then_some(u64::from(status.attempts));
            add(line);
        }
        if let Some(trouble) = &status.sink.trouble {
            let mut line = line("sink".to_owned(), "(elasticsearch)", &trouble.reason, &trouble.hint);
            line.first = Some(trouble.since);
            line.count = Some(u64::from(trouble.attempts));
            add(line);
        }
        for table in &status.tables {
            if let Some(problem) = &table.problem {
                let name = short_name(&table.table.0);
                let mut line = line(format!("table {}", table.table.0), &name, &problem.message, &problem.hint);
                line.count = (table.attempts > 0).then_some(u64::from(table.attempts));
                add(line);
            }
        }
        for rejection in &status.rejections {
            add(ErrorLine {
                key: format!("rejected {} {}", rejection.index, rejection.reason),
                count: Some(rejection.count),
                what: rejection.index.clone(),
                reason: rejection.reason.clone(),
                hint: String::new(),
                first: Some(rejection.first),
                last: Some(rejection.last),
                last_id: rejection.last_id.clone(),
            });
        }
        lines
    }

    /// The selected line of a list whose newest is on top, sorted by descending `seq`: the top while following, else the
    /// chosen one or the next older one that is still there.
    pub(super) fn newest_first(list: &List<u64>, seqs: impl ExactSizeIterator<Item = u64>) -> usize {
        let last = seqs.len().saturating_sub(1);
        match list.selected {
            Some(chosen) if !list.follow => seqs.into_iter().position(|seq| seq <= chosen).unwrap_or(last),
            _ => 0,
        }
    }

    /// Recent rates of a table, oldest first.
    pub(super) fn table_rates(&self, table: &TableId, count: usize) -> Vec<Option<f64>> {
        self.rates.get(table).map(|history| history.newest(count)).unwrap_or_default()
    }

    /// The filter of a pane, if it has one.
    pub(super) fn filter_mut(&mut self, pane: Pane) -> Option<&mut Filter> {
        match pane {
            Pane::Tables | Pane::Chunks => Some(&mut self.tables.filter),
            Pane::Events => Some(&mut self.events.filter),
            Pane::Errors => Some(&mut self.errors.filter),
            Pane::Log => Some(&mut self.log.filter),
            Pane::Replication | Pane::Sink => None,
        }
    }
}

/// What a command is called in the status line.
pub(super) fn request_name(command: &Command) -> String {
    let of = |what: &str, table: &TableId| format!("{what} of {}", text::clean(&short_name(table)));
    match command {
        Command::Pause => "pause".to_owned(),
        Command::Resume => "resume".to_owned(),
        Command::PauseTable(table) => of("pause", table),
        Command::ResumeTable(table) => of("resume", table),
        Command::Resnapshot(table) => of("resnapshot", table),
        Command::CancelResnapshot(table) => of("end of the resnapshot", table),
        Command::Stop => "stop".to_owned(),
    }
}

fn table<'a>(status: &'a Status, wanted: &TableId) -> Option<&'a TableStatus> {
    status.tables.iter().find(|table| table.table.0 == *wanted)
}

/// Whether what was asked for can be seen in the status.
fn is_true(request: &Request, status: &Status) -> bool {
    let table = |wanted: &TableId| table(status, wanted);
    match &request.command {
        Command::Pause => status.pause_requested,
        Command::Resume => !status.pause_requested,
        Command::PauseTable(id) => table(id).is_none_or(|table| table.state == TableState::Paused),
        Command::ResumeTable(id) => table(id).is_none_or(|table| table.state != TableState::Paused),
        Command::Resnapshot(id) => {
            // It may have been done in less than a frame.
            table(id).is_none_or(|table| table.resnapshot || table.resnapshots_ended > request.ended)
        }
        Command::CancelResnapshot(id) => table(id).is_none_or(|table| !table.resnapshot),
        Command::Stop => matches!(status.phase, Phase::Stopped | Phase::Failed),
    }
}

/// `orders`, or `sales.orders` outside the schema public.
pub(super) fn short_name(table: &TableId) -> String {
    if table.schema == "public" { table.name.clone() } else { table.to_string() }
}

/// The name of an event's table.
pub(super) fn event_table(status: &Status, table: u32) -> String {
    let table = usize::try_from(table).ok().and_then(|at| status.tables.get(at));
    table.map_or_else(format::unknown, |table| short_name(&table.table.0))
}

/// The word of an event.
pub(super) fn event_word(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Snapshot => "SNAPSHOT",
        EventKind::Insert => "INSERT",
        EventKind::Update => "UPDATE",
        EventKind::Delete => "DELETE",
        EventKind::Truncate => "TRUNCATE",
        EventKind::Reject => "!REJECT",
    }
}

/// The word of a notice.
pub(super) fn level_word(level: Level) -> &'static str {
    match level {
        Level::Info => "INFO",
        Level::Warn => "WARN",
        Level::Error => "ERROR",
    }
}
