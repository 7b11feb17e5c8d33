//! What the columns of a table are declared as: more than their encoding needs, as much as an index wants to know.

use tokio_postgres::Client;

use crate::problem::Problem;

/// A column by its declaration, domains and arrays taken off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnType {
    /// The column's name.
    pub name: String,
    /// Its type as SQL has it: `numeric(10,2)`, `mood[]`.
    pub sql: String,
    /// `pg_type.typname` of what is left without domains and arrays: `numeric`, `mood`.
    pub base: String,
    /// That one is PostgreSQL's own, not a user's or an extension's of the same name.
    pub built_in: bool,
    /// Its `pg_type.typtype`: `b`ase, `c`omposite, `e`num, `r`ange, `m`ultirange.
    pub kind: char,
    /// Its type modifier, such as precision and scale; -1 where there is none.
    pub modifier: i32,
    /// Arrays taken off: 1 for `int[]`, however many dimensions its values have; 2 for an array of a domain over one.
    pub arrays: i32,
}

/// The columns of a table in their order, dropped ones left out.
///
/// # Errors
/// The query fails.
pub async fn column_types(client: &Client, oid: u32) -> Result<Vec<ColumnType>, Problem> {
    let rows = client
        .query(
            "WITH RECURSIVE step (number, oid, modifier, arrays, depth) AS (
                 SELECT a.attnum, a.atttypid, a.atttypmod, 0, 0 FROM pg_catalog.pg_attribute a
                 WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped
                 UNION ALL
                 -- Not int2vector and oidvector, which print as a text.
                 SELECT s.number, CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.typelem END,
                        CASE t.typtype WHEN 'd' THEN t.typtypmod ELSE s.modifier END,
                        s.arrays + (t.typtype <> 'd')::int, s.depth + 1
                 FROM step s JOIN pg_catalog.pg_type t ON t.oid = s.oid
                 WHERE t.typtype = 'd' OR t.typcategory = 'A' AND t.typelem <> 0 AND t.oid NOT IN (22, 30)
             )
             SELECT DISTINCT ON (a.attnum) a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), t.typname::text,
                    t.typnamespace = 'pg_catalog'::regnamespace AND t.oid < 16384, t.typtype::text, s.modifier, s.arrays
             FROM step s JOIN pg_catalog.pg_type t ON t.oid = s.oid
             JOIN pg_catalog.pg_attribute a ON a.attrelid = $1 AND a.attnum = s.number
             ORDER BY a.attnum, s.depth DESC",
            &[&oid],
        )
        .await?;
    let column = |row: &tokio_postgres::Row| ColumnType {
        name: row.get(0),
        sql: row.get(1),
        base: row.get(2),
        built_in: row.get(3),
        kind: row.get::<_, String>(4).chars().next().unwrap_or('b'),
        modifier: row.get(5),
        arrays: row.get(6),
    };
    Ok(rows.iter().map(column).collect())
}
