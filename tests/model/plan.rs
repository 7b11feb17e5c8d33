//! What happens around the transactions: pauses, copies, ends of the process, lost connections, a document store that fails.

use fastrand::Rng;
use pgtide::store::{Effect, Fault};

use super::alter::Away;
use super::audit::Damage;
use super::profile::{PROFILES, Profile, REWRITES, Scene, weighted};
use super::schema::{Kind, Schema, pick};
use super::traffic::Weights;

/// One step. Each is over before the next begins, except that transactions go on.
#[derive(Clone, Debug)]
pub enum Step {
    /// Each session may run so many more transactions.
    Go(u32),
    /// Waits until so many were run since the last `Go`, all sessions together.
    Until(u32),
    /// Waits until no session has one to run.
    Join,
    /// A process starts, if none runs.
    Start,
    /// A second process on the same slot starts, if none runs.
    Second,
    /// SIGKILL; where a second process runs, that one goes on alone. Otherwise what is confirmed is compared with what the store has.
    Kill,
    /// SIGTERM, and the same.
    Terminate,
    /// The whole pipeline; until it says so where that is true.
    Pause,
    Resume,
    /// The copy of a table.
    PauseTable(Kind),
    ResumeTable(Kind),
    Resnapshot(Kind),
    Cancel(Kind),
    /// Ends the connections to PostgreSQL whose purpose contains this.
    Cut(&'static str),
    /// The document store fails.
    Fault(Fault),
    /// The same, whatever it is asked.
    Outage(Fault),
    /// Takes all faults away; what is held goes on.
    Release,
    /// Waits for a request that is held, as long as one may come.
    Held,
    /// Waits until all that is committed is confirmed; not for long.
    Delivered,
    /// Waits until PostgreSQL was told that everything has arrived; not for long.
    Received,
    /// The store forgets what was deleted, as a node does that restarts, or a minute later.
    Forget,
    /// Waits until it streams, as long as nothing is in the way.
    Streaming,
    /// A statement that is run while no transaction is.
    Sql(String),
    /// Something becomes of a table.
    Away(Kind, Away),
    /// And ends.
    Back,
    /// Two transactions of the table `singles` that commit in another order than they changed a row; a seed of theirs.
    Crossing(u64),
}

/// Everything that a seed decides.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub profile: Profile,
    pub schema: Schema,
    pub sessions: u32,
    pub weights: Weights,
    /// What is done to documents in the end, for `pgtide verify` to find and to repair.
    pub damage: Vec<Damage>,
    pub steps: Vec<Step>,
}

impl Plan {
    /// The history of a seed; of this profile, or of one that the seed chooses.
    pub fn of(seed: u64, profile: Option<Profile>) -> Self {
        let mut rng = Rng::with_seed(seed);
        let chosen = *weighted(&mut rng, PROFILES);
        let profile = profile.unwrap_or(chosen);
        let at_most = profile.at_most.max(profile.tables.len());
        let at_most = rng.usize(profile.tables.len().max(1)..=at_most);
        let schema = Schema::random(&mut rng, profile.tables, at_most, profile.many_chunks);
        let mut writer = Writer { rng, schema: &schema, steps: Vec::new() };
        writer.beginning(&profile);
        let count = writer.rng.usize(profile.count.0..=profile.count.1);
        for _ in 0..count {
            let scene = *weighted(&mut writer.rng, profile.scenes);
            writer.scene(scene);
        }
        let sessions = writer.rng.u32(2..4);
        let damage = Damage::random(&mut writer.rng, &schema);
        let steps = writer.steps;
        Self { seed, profile, schema, sessions, weights: profile.weights, damage, steps }
    }
}

struct Writer<'a> {
    rng: Rng,
    schema: &'a Schema,
    steps: Vec<Step>,
}

impl Writer<'_> {
    fn add<const N: usize>(&mut self, steps: [Step; N]) {
        self.steps.extend(steps);
    }

    fn table(&mut self) -> Kind {
        *pick(&mut self.rng, &self.schema.tables)
    }

    /// Transactions that go on with what follows.
    fn go(&mut self) {
        let count = self.rng.u32(2..12);
        self.steps.push(Step::Go(count));
        if self.rng.bool() {
            let part = self.rng.u32(..=count);
            self.steps.push(Step::Until(part));
        }
    }

    /// Transactions, to their end.
    fn changes(&mut self) {
        self.steps.push(Step::Go(self.rng.u32(2..12)));
        self.steps.push(Step::Join);
    }

    fn hold(&mut self, after: u64) {
        if after > 0 {
            self.steps.push(Step::Fault(Fault::new(Effect::Delay { milliseconds: 0 }).times(after)));
        }
        let (applied, times) = (self.rng.bool(), self.rng.u64(1..4));
        self.steps.push(Step::Fault(Fault::new(Effect::Hold { applied }).times(times)));
    }

    /// A resnapshot, some rows of which are on their way to the store.
    fn held_copy(&mut self, table: Kind) {
        let after = self.rng.u64(..4);
        self.add([
            Step::Fault(Fault::new(Effect::Delay { milliseconds: 0 }).times(after)),
            Step::Fault(Fault::new(Effect::Hold { applied: false }).times(1)),
            Step::Resnapshot(table),
            Step::Held,
        ]);
    }

    fn fault(&mut self) -> Step {
        let rng = &mut self.rng;
        let effect = match rng.u32(..7) {
            0 => Effect::Reject { status: *pick(rng, &[429, 503, 500, 502]), kind: None },
            1 => Effect::RejectItems { status: 429, kind: None, every: rng.u64(1..4), ids: Default::default() },
            2 => Effect::RejectItems { status: 503, kind: None, every: rng.u64(1..4), ids: Default::default() },
            3 => Effect::ApplyThenFail { status: None },
            4 => Effect::ApplyThenFail { status: Some(*pick(rng, &[429, 503, 504])) },
            5 => Effect::Cut { bytes: rng.u64(0..400) },
            _ => Effect::Delay { milliseconds: rng.u64(1..30) },
        };
        let fault = Fault::new(effect).times(rng.u64(1..4));
        // A sweep's, a scan's, and whatever else there is.
        match rng.u32(..6) {
            0 => Step::Fault(fault.on("_search")),
            1 => Step::Outage(fault.on("")),
            _ => Step::Fault(fault),
        }
    }

    /// The first start.
    fn beginning(&mut self, profile: &Profile) {
        if profile.name == REWRITES.name || self.rng.u32(..3) == 0 {
            self.scene(Scene::Fresh);
        } else if self.rng.bool() {
            self.steps.push(Step::Start);
            self.go();
        } else {
            self.add([Step::Start, Step::Streaming]);
        }
        if self.rng.u32(..8) == 0 {
            // It helps with the copy, or stands by.
            self.steps.push(Step::Second);
        }
    }

    fn scene(&mut self, scene: Scene) {
        match scene {
            Scene::Calm => self.changes(),
            Scene::Held => {
                self.hold(0);
                self.changes();
                self.steps.push(Step::Release);
            }
            Scene::Faults => {
                for _ in 0..self.rng.usize(1..4) {
                    let fault = self.fault();
                    self.steps.push(fault);
                }
                self.changes();
            }
            Scene::Kill => {
                self.go();
                self.add([Step::Kill, Step::Start]);
            }
            Scene::KillHeld => {
                self.steps.push(Step::Streaming);
                let after = self.rng.u64(..3);
                self.hold(after);
                self.changes();
                self.add([Step::Held, Step::Received, Step::Kill, Step::Start]);
            }
            Scene::Terminate => {
                self.go();
                self.add([Step::Release, Step::Terminate, Step::Start]);
            }
            Scene::Down => {
                let end = if self.rng.bool() { Step::Kill } else { Step::Terminate };
                self.steps.push(end);
                self.changes();
                self.steps.push(Step::Start);
            }
            Scene::Pause => {
                self.go();
                self.add([Step::Pause]);
                self.changes();
                self.steps.push(Step::Resume);
            }
            Scene::Cut => {
                self.go();
                let of =
                    *pick(&mut self.rng, &["", "stream", "ledger", "copy", "keeper", "catalog", "control", "monitor"]);
                self.steps.push(Step::Cut(of));
                self.go();
            }
            Scene::Resnapshot => {
                let table = self.table();
                self.add([Step::Streaming, Step::Resnapshot(table)]);
                self.go();
                match self.rng.u32(..6) {
                    0 => self.add([Step::Kill, Step::Start]),
                    1 => self.add([Step::PauseTable(table), Step::Join, Step::ResumeTable(table)]),
                    2 => {
                        let of = *pick(&mut self.rng, &["copy", "keeper", "ledger", "stream", "snapshot"]);
                        self.add([Step::Cut(of)]);
                    }
                    _ => {}
                }
                self.steps.push(Step::Join);
            }
            Scene::Resurrection => {
                let table = self.table();
                self.add([Step::Join, Step::Streaming]);
                self.held_copy(table);
                self.changes();
                self.add([Step::Delivered, Step::Forget, Step::Release]);
                self.go();
            }
            Scene::Cancelled => {
                // Not where a copy may have been asked for by the engine itself, which a cancel takes back.
                let tables: Vec<Kind> =
                    self.schema.tables.iter().copied().filter(|kind| *kind != Kind::Parts).collect();
                if tables.is_empty() {
                    return self.changes();
                }
                let table = *pick(&mut self.rng, &tables);
                self.add([Step::Join, Step::Streaming]);
                if self.rng.bool() {
                    self.add([Step::Resnapshot(table)]);
                    self.go();
                    self.add([Step::Cancel(table), Step::Join]);
                } else {
                    self.held_copy(table);
                    self.changes();
                    self.add([Step::Delivered, Step::Forget, Step::Cancel(table), Step::Release]);
                }
            }
            Scene::Takeover => {
                self.add([Step::Second]);
                self.go();
                self.add([Step::Kill]);
                self.go();
            }
            Scene::Away => {
                let table = self.table();
                let away = Away::random(&mut self.rng, table);
                let running = self.rng.u32(..3) > 0;
                if running {
                    self.steps.push(Step::Streaming);
                    self.go();
                } else {
                    self.steps.push(Step::Kill);
                }
                self.steps.push(Step::Away(table, away));
                self.changes();
                match self.rng.u32(..6) {
                    0 => self.add([Step::Kill, Step::Start]),
                    1 => self.add([Step::Cut(""), Step::Streaming]),
                    2 => self.steps.push(Step::Resnapshot(table)),
                    _ => {}
                }
                self.steps.push(Step::Back);
                self.go();
                if !running {
                    self.steps.push(Step::Start);
                }
            }
            Scene::Crossing if self.schema.tables.contains(&Kind::Unique) => {
                self.add([Step::Streaming]);
                self.go();
                let seed = self.rng.u64(..);
                self.add([Step::Crossing(seed), Step::Join]);
            }
            Scene::Crossing => self.changes(),
            Scene::Fresh => {
                // In the middle of a copy, then without a process, then again.
                let after = self.rng.u64(..16);
                self.hold(after);
                self.add([Step::Start, Step::Held]);
                if self.rng.bool() {
                    self.changes();
                }
                self.add([Step::Kill]);
                let table = self.table();
                if self.rng.bool() {
                    self.steps.push(Step::Sql(format!("DELETE FROM {} WHERE id % 3 > 0", table.name())));
                }
                match self.rng.u32(..4) {
                    0 => self.changes(),
                    1 => self.steps.push(Step::Sql(format!("TRUNCATE {} CASCADE", table.name()))),
                    _ => self.steps.push(Step::Sql(format!("VACUUM FULL {}", table.name()))),
                }
                if self.rng.bool() {
                    self.changes();
                }
                self.steps.push(Step::Start);
                self.go();
            }
        }
    }
}
