//! The Elasticsearch pane: is it the brake?
//!
//! ```text
//! ┌─ Elasticsearch ─────────────────┐
//! │ bulk 1.90 k docs, 4.1 MiB       │
//! │ p50 96  p95 240  p99 412 ms     │
//! │ ▂▂▃▃▂▃▅▇▅▃▂▂▂▃▂▂▂▃▄▃▂▂▂▂▃       │
//! │ in flight 6/8   queue 12.2 k    │
//! │ 429 3/s   retried 1,204         │
//! │ rejected 17!  superseded 311    │
//! │ answered 81.4 M                 │
//! │ !429 es_rejected_execution      │
//! └─────────────────────────────────┘
//! ```

use ratatui::layout::Rect;

use crate::engine::Status;
use crate::tui::app::{App, Pane};
use crate::tui::format;
use crate::tui::style::Token;
use crate::tui::text;

use super::{Canvas, Piece, frozen_title, piece};

/// Draws as many of its lines as there is room for.
pub(super) fn draw(canvas: &mut Canvas<'_>, area: Rect, app: &App, shown: &Status, held: Option<u64>) {
    let sink = &shown.sink;
    let name = match sink.distribution.as_deref() {
        Some("opensearch") => "OpenSearch",
        Some("pgtide-store") => "Local store",
        _ => "Elasticsearch",
    };
    let right: Vec<Piece> = frozen_title(held).into_iter().collect();
    let inner = canvas.pane(area, &[piece(name, Token::Title)], &right, app.focused() == Pane::Sink);
    let width = inner.width.saturating_sub(2);
    let wide = width >= 45;
    let dim = |text: &str| piece(text, Token::Dim);
    let text = |text: String| piece(text, Token::Text);
    let loud = |text: String, is: bool, token: Token| piece(text, if is { token } else { Token::Text });

    let documents = sink.bulk_documents.map_or_else(format::unknown, format::rows);
    let mut lines = vec![vec![
        dim("bulk "),
        text(format!("{documents} docs, {}", format::bytes_opt(sink.bulk_bytes))),
        text(if wide { format!("   {}", format::byte_rate(sink.bytes_per_second)) } else { String::new() }),
    ]];
    lines.push(match sink.latency {
        Some(latency) => {
            // The narrow pane has no room for the slowest, which must not choose its unit either.
            let max = if wide { latency.max } else { 0.0 };
            let ([p50, p95, p99, max], unit) = format::latencies([latency.p50, latency.p95, latency.p99, max]);
            let mut line = vec![dim("p50 "), text(p50), dim("  p95 "), text(p95), dim("  p99 "), text(p99)];
            if wide {
                line.extend([dim("  max "), text(max)]);
            }
            line.push(dim(&format!(" {unit}")));
            line
        }
        None => vec![dim("p50 -  p95 -  p99 - ms")],
    });
    let cells = usize::from(width).min(60).saturating_sub(if wide { 8 } else { 6 });
    lines.push(vec![piece(format::sparkline(&app.bulk.newest(cells)), Token::Accent)]);
    if wide {
        let span = format::span(app.bulk.bin_seconds() * cells as u64);
        lines.push(vec![dim(&format!("answer time, last {span}, by {} s", app.bulk.bin_seconds()))]);
    }
    lines.push(vec![
        dim("in flight "),
        text(format!("{}/{}", sink.in_flight, sink.in_flight_limit)),
        dim("   queue "),
        text(format::rows(sink.queued_documents)),
    ]);
    let throttled = sink.throttled_per_second > 0.0;
    lines.push(vec![
        dim("429 "),
        loud(format!("{}/s", format::rate(sink.throttled_per_second)), throttled, Token::Warn),
        dim("   retried "),
        text(format::short_count(sink.retried)),
    ]);
    let rejected = if sink.rejected > 0 { format!("{}!", format::short_count(sink.rejected)) } else { "0".to_owned() };
    lines.push(vec![
        dim("rejected "),
        loud(rejected, sink.rejected > 0, Token::Bad),
        dim("  superseded "),
        text(format::rows(sink.superseded)),
    ]);
    if let Some(trouble) = &sink.trouble {
        // Before the totals: a pane that has room for one more line must show what is wrong.
        lines.push(vec![piece(
            format!("!{} (attempt {})", text::clean(&trouble.reason), trouble.attempts),
            Token::Warn,
        )]);
        if wide {
            lines.push(vec![piece(text::clean(&trouble.hint), Token::Text)]);
        }
    }
    lines.push(vec![dim("answered "), text(format::rows(sink.documents))]);
    if wide {
        lines.push(Vec::new());
        for index in &sink.indices {
            lines.push(vec![
                dim(&text::left(&text::clean(&index.index), 22)),
                text(format!("  {} indexed, {} deleted", format::rows(index.indexed), format::rows(index.deleted))),
            ]);
        }
    }
    for (y, line) in (inner.y..inner.bottom()).zip(&lines) {
        canvas.pieces(inner.x + 1, y, width, line);
    }
}
