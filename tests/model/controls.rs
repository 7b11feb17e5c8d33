//! Whether the model would notice: each rule is broken on purpose in the processes of a search, which has to find it.

use libtest_mimic::Failed;

use super::history::Rule;
use super::profile::{ANSWERS, DELETES, LARGE, ORDER, Profile, REWRITES};
use super::search::Search;

/// A rule that is broken (`src/broken.rs`), and what has to find it.
#[derive(Clone, Copy)]
pub struct Control {
    pub name: &'static str,
    broken: &'static str,
    profile: Profile,
    /// Histories at most.
    within: u64,
}

pub const CONTROLS: [Control; 6] = [
    Control {
        name: "found::the_position_of_the_change_as_version",
        broken: "CommitVersion",
        profile: ORDER,
        within: 30,
    },
    Control {
        name: "found::an_acknowledgement_before_the_answer",
        broken: "AnswerFirst",
        profile: ANSWERS,
        within: 30,
    },
    Control { name: "found::a_copy_without_a_delete_set", broken: "DeleteSet", profile: DELETES, within: 60 },
    Control { name: "found::a_copy_of_a_rewritten_table", broken: "Filenode", profile: REWRITES, within: 60 },
    Control { name: "found::a_value_that_was_not_sent_and_not_read", broken: "Fill", profile: LARGE, within: 20 },
    Control { name: "found::a_sweep_without_a_bound", broken: "SweepBound", profile: DELETES, within: 30 },
];

impl Control {
    /// Searches with the rule broken.
    pub async fn run(self, first: u64) -> Result<(), Failed> {
        let environment = vec![("PGTIDE_BROKEN", self.broken.to_owned())];
        let search = Search { first, count: self.within, profile: Some(self.profile), environment, show: false };
        let (found, run) = search.run().await;
        let Some(found) = found else {
            return Err(format!(
                "{} is broken, and {} histories from seed {first} did not find it",
                self.broken, self.within
            )
            .into());
        };
        if !matches!(found.rule, Rule::Equal | Rule::Acknowledged) {
            return Err(found.text.into());
        }
        println!(
            "{} is broken: found by history {} of {}, as {:?}",
            self.broken,
            found.number + 1,
            run.histories,
            found.rule
        );
        Ok(())
    }
}
