//! Rows to documents.

use crate::change::Field;
use crate::table::Column;

use super::{Kind, write_string, write_value};

/// Writes the rows of one table as JSON objects. Made once for a table's columns.
///
/// ```
/// use pgtide::change::Field;
/// use pgtide::table::Column;
/// let columns = [
///     Column { name: "id".into(), type_oid: 20, key: true },
///     Column { name: "name".into(), type_oid: 25, key: false },
/// ];
/// let mut out = Vec::new();
/// pgtide::text::Encoder::new(&columns).row(&mut out, [Field::Text(b"7"), Field::Null])?;
/// assert_eq!(out, br#"{"id":7,"name":null}"#);
/// # Ok::<(), pgtide::text::RowError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Encoder {
    columns: Vec<Prepared>,
}

#[derive(Clone, Debug)]
struct Prepared {
    /// `,"name":`
    fragment: Box<[u8]>,
    kind: Kind,
}

/// A row that is not to become a document as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// PostgreSQL did not send the value of this column, counted from 0, because the update left it alone.
    #[error("the value of column {0} was not sent")]
    Unchanged(usize),
    /// The row belongs to another shape of the table.
    #[error("a row of {fields} fields came for a table of {columns} columns")]
    Fields {
        /// Columns that the encoder knows.
        columns: usize,
        /// Fields that came; one more than `columns` when there were too many.
        fields: usize,
    },
}

impl Encoder {
    /// An encoder for rows of these columns, in this order. Names that occur twice would make a JSON object with a
    /// double key; PostgreSQL has none in a table.
    #[must_use]
    pub fn new(columns: &[Column]) -> Self {
        let prepare = |column: &Column| {
            let mut fragment = vec![b','];
            write_string(&mut fragment, column.name.as_bytes());
            fragment.push(b':');
            Prepared { fragment: fragment.into(), kind: Kind::of(column.type_oid) }
        };
        Self { columns: columns.iter().map(prepare).collect() }
    }

    /// Appends the row as one JSON object, without a line break.
    ///
    /// # Errors
    /// A field is [`Field::Unchanged`], or there are more or fewer fields than columns. `out` is then as before.
    #[inline]
    pub fn row<'a>(&self, out: &mut Vec<u8>, fields: impl IntoIterator<Item = Field<'a>>) -> Result<(), RowError> {
        self.row_with(out, fields, |_, _| false)
    }

    /// The same, with `fill` asked to append the JSON value of a column that was not sent. It says whether it did.
    ///
    /// # Errors
    /// `fill` did not, or there are more or fewer fields than columns. `out` is then as before.
    #[inline]
    pub fn row_with<'a>(
        &self,
        out: &mut Vec<u8>,
        fields: impl IntoIterator<Item = Field<'a>>,
        mut fill: impl FnMut(&mut Vec<u8>, usize) -> bool,
    ) -> Result<(), RowError> {
        let start = out.len();
        let mut fields = fields.into_iter();
        for (at, column) in self.columns.iter().enumerate() {
            out.extend_from_slice(&column.fragment);
            let problem = match fields.next() {
                Some(Field::Text(text)) => {
                    write_value(out, column.kind, text);
                    continue;
                }
                Some(Field::Null) => {
                    out.extend_from_slice(b"null");
                    continue;
                }
                Some(Field::Unchanged) if fill(out, at) => continue,
                Some(Field::Unchanged) => RowError::Unchanged(at),
                None => RowError::Fields { columns: self.columns.len(), fields: at },
            };
            out.truncate(start);
            return Err(problem);
        }
        if fields.next().is_some() {
            out.truncate(start);
            return Err(RowError::Fields { columns: self.columns.len(), fields: self.columns.len() + 1 });
        }
        if self.columns.is_empty() {
            out.push(b'{');
        } else {
            // The first comma.
            out[start] = b'{';
        }
        out.push(b'}');
        Ok(())
    }
}
