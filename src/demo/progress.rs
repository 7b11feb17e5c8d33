//! Progress of the demo's start on stderr.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{OnStep, Step};

/// How the loading of rows looks.
const ROWS: &str = "{msg} {bar:30} {human_pos}/{human_len} {per_sec}";

/// A progress line on stderr; nothing when that is not a terminal. Clones draw the same line.
#[derive(Clone, Debug)]
pub struct Bars {
    bar: ProgressBar,
}

impl Bars {
    /// Draws nothing yet.
    #[must_use]
    pub fn new() -> Self {
        let target =
            if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { bar: ProgressBar::with_draw_target(None, target) }
    }

    /// For [`Options::on_step`](super::Options::on_step).
    #[must_use]
    pub fn on_step(&self) -> OnStep {
        let bar = self.bar.clone();
        Arc::new(move |step| {
            bar.enable_steady_tick(Duration::from_millis(100));
            bar.set_message(message(step));
        })
    }

    /// For [`seed`](super::seed()): rows done, rows in all.
    pub fn on_rows(&self) -> impl Fn(u64, u64) + Send + Sync + use<> {
        let bar = self.bar.clone();
        move |done, total| {
            if bar.length() != Some(total) {
                bar.set_length(total);
                // A template that does not parse would only cost the look.
                if let Ok(style) = ProgressStyle::with_template(ROWS) {
                    bar.set_style(style);
                }
                bar.set_message("loading rows");
            }
            bar.set_position(done);
        }
    }

    /// Removes the line, so that the screen may be drawn.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

impl Default for Bars {
    fn default() -> Self {
        Self::new()
    }
}

fn message(step: Step) -> String {
    match step {
        Step::Fetching => "no PostgreSQL here: fetching one".into(),
        Step::Unpacking(bytes) => format!("unpacking PostgreSQL ({})", HumanBytes(bytes)),
        Step::Creating => "creating a database cluster".into(),
        Step::Starting => "starting PostgreSQL".into(),
        Step::Ready => "PostgreSQL is ready".into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn steps_and_rows_reach_the_bar() {
        let bars = Bars { bar: ProgressBar::hidden() };
        bars.on_step()(Step::Unpacking(10 << 20));
        assert_eq!(bars.bar.message(), "unpacking PostgreSQL (10.00 MiB)");
        let rows = bars.on_rows();
        rows(500, 2_000);
        rows(1_000, 2_000);
        assert_eq!((bars.bar.position(), bars.bar.length()), (1_000, Some(2_000)));
        bars.clear();
        assert!(bars.bar.is_finished());
    }

    #[test]
    fn the_template_is_one() {
        ProgressStyle::with_template(ROWS).unwrap();
    }
}
