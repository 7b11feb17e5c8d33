//! What histories are about: which tables, which changes and which scenes are likely in them.

use fastrand::Rng;

use super::schema::Kind;
use super::traffic::Weights;

/// What a history is about: tables, changes and scenes, each more or less likely.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    pub name: &'static str,
    /// These tables, and others up to `at_most`.
    pub tables: &'static [Kind],
    pub at_most: usize,
    pub weights: Weights,
    pub scenes: &'static [(u32, Scene)],
    /// Scenes of a history.
    pub count: (usize, usize),
    /// Tables have many chunks, and bulks are small.
    pub many_chunks: bool,
}

/// Steps that belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scene {
    Calm,
    /// Answers are held while changes go on.
    Held,
    Faults,
    Kill,
    KillHeld,
    Terminate,
    Down,
    Pause,
    Cut,
    Resnapshot,
    /// Rows of a resnapshot are on their way while they are deleted, and the store forgets that.
    Resurrection,
    Cancelled,
    Fresh,
    /// Two processes; the first is killed, and the second goes on.
    Takeover,
    /// A table is not what it was for a while.
    Away,
    /// Transactions that change a row in another order than they commit.
    Crossing,
}

const SCENES: &[(u32, Scene)] = &[
    (3, Scene::Calm),
    (3, Scene::Held),
    (3, Scene::Faults),
    (3, Scene::Kill),
    (3, Scene::KillHeld),
    (2, Scene::Terminate),
    (2, Scene::Down),
    (2, Scene::Pause),
    (3, Scene::Cut),
    (3, Scene::Resnapshot),
    (3, Scene::Resurrection),
    (1, Scene::Cancelled),
    (1, Scene::Takeover),
    (1, Scene::Crossing),
];

/// Some of everything; the others look for one thing more closely.
pub const EVERYTHING: Profile = Profile {
    name: "everything",
    tables: &[],
    at_most: 4,
    weights: Weights::EVERYTHING,
    scenes: SCENES,
    count: (2, 6),
    many_chunks: false,
};

/// Concurrent changes of few keys, some of which wait for each other after they were written to the WAL.
pub const ORDER: Profile = Profile {
    name: "order",
    tables: &[Kind::Unique],
    at_most: 1,
    weights: Weights { insert: 8, update: 2, large: 4, delete: 8, keys: 3, statements: 10, ..Weights::ROWS },
    scenes: &[(1, Scene::Calm), (1, Scene::Resnapshot), (4, Scene::Crossing)],
    count: (2, 4),
    many_chunks: false,
};

/// The end of the process while answers are outstanding.
pub const ANSWERS: Profile = Profile {
    name: "answers",
    tables: &[Kind::Plain],
    at_most: 2,
    weights: Weights::ROWS,
    scenes: &[(1, Scene::Kill), (4, Scene::KillHeld), (1, Scene::Terminate), (1, Scene::Faults), (1, Scene::Cut)],
    count: (2, 4),
    many_chunks: false,
};

/// Rows that are copied again while they are deleted.
pub const DELETES: Profile = Profile {
    name: "deletes",
    tables: &[Kind::Plain],
    at_most: 2,
    weights: Weights { delete: 12, many: 6, keys: 4, ..Weights::ROWS },
    scenes: &[(4, Scene::Resurrection), (2, Scene::Cancelled), (1, Scene::Resnapshot), (1, Scene::Kill)],
    count: (2, 4),
    many_chunks: false,
};

/// Tables that are rewritten while they are copied.
pub const REWRITES: Profile = Profile {
    name: "rewrites",
    tables: &[Kind::Plain],
    at_most: 1,
    weights: Weights { rewrite: 9, ..Weights::ROWS },
    scenes: &[(2, Scene::Kill), (1, Scene::Down), (1, Scene::Resnapshot)],
    count: (1, 3),
    many_chunks: true,
};

/// Large values that a change does not send.
pub const LARGE: Profile = Profile {
    name: "large",
    tables: &[Kind::Large, Kind::Pairs],
    at_most: 3,
    weights: Weights { large: 10, update: 10, key: 5, ..Weights::EVERYTHING },
    scenes: &[(2, Scene::Calm), (1, Scene::Held), (1, Scene::Kill), (1, Scene::Resnapshot), (1, Scene::Pause)],
    count: (2, 4),
    many_chunks: false,
};

/// Tables that are emptied.
pub const EMPTIED: Profile = Profile {
    name: "emptied",
    tables: &[Kind::Plain, Kind::Parts],
    at_most: 3,
    weights: Weights { truncate: 5, many: 4, ..Weights::EVERYTHING },
    scenes: SCENES,
    count: (2, 4),
    many_chunks: false,
};

/// Tables that are altered.
pub const ALTERED: Profile = Profile {
    name: "altered",
    tables: &[],
    at_most: 3,
    weights: Weights { alter: 3, rewrite: 1, truncate: 1, ..Weights::EVERYTHING },
    scenes: &[
        (4, Scene::Away),
        (2, Scene::Calm),
        (1, Scene::Held),
        (1, Scene::Kill),
        (1, Scene::Down),
        (1, Scene::Pause),
        (1, Scene::Cut),
        (1, Scene::Resnapshot),
        (1, Scene::Takeover),
    ],
    count: (1, 4),
    many_chunks: false,
};

/// Partitions that come, go and are emptied.
pub const PARTITIONS: Profile = Profile {
    name: "partitions",
    tables: &[Kind::Parts],
    at_most: 2,
    weights: Weights { alter: 3, truncate: 2, ..Weights::EVERYTHING },
    scenes: ALTERED.scenes,
    count: (1, 4),
    many_chunks: false,
};

/// All of them, the first most often.
pub const PROFILES: &[(u32, Profile)] = &[
    (8, EVERYTHING),
    (1, ORDER),
    (1, ANSWERS),
    (1, DELETES),
    (2, REWRITES),
    (1, LARGE),
    (1, EMPTIED),
    (1, TAKEOVER),
    (3, ALTERED),
    (2, PARTITIONS),
];

impl Profile {
    /// The profile of this name.
    ///
    /// # Errors
    /// There is none; the text says which there are.
    pub fn named(name: &str) -> Result<Self, String> {
        let found = PROFILES.iter().map(|(_, profile)| profile).find(|profile| profile.name == name);
        let names: Vec<&str> = PROFILES.iter().map(|(_, profile)| profile.name).collect();
        found.copied().ok_or_else(|| format!("the profiles are {}", names.join(", ")))
    }
}

/// Two processes on one slot, the first of which is killed while it copies, or later.
pub const TAKEOVER: Profile = Profile {
    name: "takeover",
    tables: &[],
    at_most: 3,
    weights: Weights::EVERYTHING,
    scenes: &[
        (3, Scene::Takeover),
        (1, Scene::Resnapshot),
        (1, Scene::Cut),
        (1, Scene::KillHeld),
        (1, Scene::Terminate),
    ],
    count: (2, 4),
    many_chunks: true,
};

/// One of several, by their weights.
pub fn weighted<'a, T>(rng: &mut Rng, of: &'a [(u32, T)]) -> &'a T {
    let total: u32 = of.iter().map(|(weight, _)| weight).sum();
    let mut choice = rng.u32(..total);
    for (weight, one) in of {
        if choice < *weight {
            return one;
        }
        choice -= weight;
    }
    &of[0].1
}
