//! Rules that a test breaks on purpose, to show that breaking them is noticed (`tests/model`, `tests/processes/`). Not in release builds.

/// A rule of `docs/architecture.md` that can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// The version of a change is the position of its commit: broken, that of the change.
    CommitVersion,
    /// What is not answered for is not acknowledged.
    AnswerFirst,
    /// What is deleted during a copy is remembered.
    DeleteSet,
    /// A table that was rewritten since its copy was planned is planned anew.
    Filenode,
    /// Values that PostgreSQL did not send are read: broken, they become NULL.
    Fill,
    /// A sweep removes only what is older than its bound.
    SweepBound,
    /// Who works on a chunk shows the token of its claim.
    ClaimToken,
    /// Nothing is sent without an answer from PostgreSQL a moment ago.
    Lease,
}

/// The environment variable `PGTIDE_BROKEN` names this rule; several are parted by commas.
#[cfg(debug_assertions)]
pub(crate) fn broken(rule: Rule) -> bool {
    static BROKEN: std::sync::LazyLock<Vec<Rule>> = std::sync::LazyLock::new(|| {
        let names = std::env::var("PGTIDE_BROKEN").unwrap_or_default();
        let rules = [
            Rule::CommitVersion,
            Rule::AnswerFirst,
            Rule::DeleteSet,
            Rule::Filenode,
            Rule::Fill,
            Rule::SweepBound,
            Rule::ClaimToken,
            Rule::Lease,
        ];
        let named = |rule: &Rule| names.split(',').any(|name| format!("{rule:?}") == name);
        let broken: Vec<Rule> = rules.into_iter().filter(named).collect();
        if !broken.is_empty() {
            tracing::warn!(?broken, "PGTIDE_BROKEN: broken on purpose, documents will not be equal to rows");
        }
        broken
    });
    BROKEN.contains(&rule)
}

#[cfg(not(debug_assertions))]
pub(crate) const fn broken(_: Rule) -> bool {
    false
}
