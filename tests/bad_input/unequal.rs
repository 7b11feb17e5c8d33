//! What would keep documents from being equal to rows: refused, or said aloud where it may be meant so.

use serde_json::json;

use crate::case::{Case, Ended, PASSWORD, SOON, documents};
use crate::support::rows_as_json;

/// It goes live, and says all of `words` as one warning in the log file.
async fn starts_with_warning(case: &Case, words: &[&str]) -> Ended {
    let ended = case.run(&["--until-live"], SOON).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    let said = |line: &str| line.contains("WARN") && words.iter().all(|word| line.contains(word));
    assert!(ended.logs.lines().any(said) || ended.stderr.lines().any(said), "{words:?} in {}{ended}", ended.logs);
    ended
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_without_some_operations() {
    let mut case = Case::new().await;
    case.client
        .batch_execute("CREATE PUBLICATION tide FOR TABLE people WITH (publish = 'insert, truncate')")
        .await
        .unwrap();
    let mend = "ALTER PUBLICATION \"tide\" SET (publish = 'insert, update, delete, truncate')";
    let words = ["tide does not publish UPDATE, DELETE", "first version", "deleted rows stay", mend];
    starts_with_warning(&case, &words).await;
    case.equal().await;

    case.set("/cdc/publication/operations", json!(["INSERT", "UPDATE"]));
    let mend = "ALTER PUBLICATION \"tide\" SET (publish = 'insert, update, truncate')";
    case.refused(4, &["tide does not publish UPDATE", "first version", mend]).await;
    // Meant so, and told with the configuration.
    case.set("/cdc/publication/operations", json!(["INSERT", "TRUNCATE"]));
    let ended = case.run(&["--until-live"], SOON).await;
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(!ended.stderr.contains("does not publish"), "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_the_role_does_not_see() {
    let mut case = Case::new().await;
    let role = case.slot.clone();
    let make = format!(
        "CREATE ROLE {role} LOGIN REPLICATION PASSWORD '{PASSWORD}'; GRANT SELECT ON people TO {role};
         GRANT USAGE, CREATE ON SCHEMA public TO {role}; CREATE PUBLICATION tide FOR TABLE people;
         CREATE POLICY first ON people USING (id = 1); ALTER TABLE people ENABLE ROW LEVEL SECURITY"
    );
    case.client.batch_execute(&make).await.unwrap();
    case.set("/cdc/username", role.as_str()).set("/cdc/password", PASSWORD);
    let cure = format!("ALTER ROLE \"{role}\" BYPASSRLS");
    case.refused(4, &[&role, "public.people", "row security", &cure]).await;
    assert_eq!(case.confirmed().await, None);
    case.client.batch_execute(&cure).await.unwrap();
    case.starts().await;
    let clean = format!(
        "SELECT pg_drop_replication_slot('{role}'); REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}; DROP ROLE {role}"
    );
    case.client.batch_execute(&clean).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_inherit() {
    let case = Case::new().await;
    let make = "CREATE TABLE pupils (school text) INHERITS (people); INSERT INTO pupils VALUES (4, 'Barbara', 'MIT')";
    case.client.batch_execute(make).await.unwrap();
    starts_with_warning(&case, &["public.people", "inherit", "pupils", "neither copied nor streamed"]).await;
    assert_eq!(documents(&case.store), rows_as_json(&case.client, "ONLY people").await);
    // It has no key: published, it could not be changed by its application.
    case.client
        .batch_execute("UPDATE people SET name = upper(name); INSERT INTO people VALUES (5, 'Donald')")
        .await
        .unwrap();
    starts_with_warning(&case, &["pupils"]).await;
    assert_eq!(documents(&case.store), rows_as_json(&case.client, "ONLY people").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_sends_another_key() {
    let case = Case::new().await;
    let make = "DROP TABLE people; CREATE TABLE people (id int PRIMARY KEY, name text NOT NULL) PARTITION BY RANGE (id);
                CREATE TABLE first PARTITION OF people FOR VALUES FROM (0) TO (100); INSERT INTO people VALUES (1, 'Ada');
                CREATE UNIQUE INDEX by_name ON first (name); ALTER TABLE first REPLICA IDENTITY USING INDEX by_name";
    case.client.batch_execute(make).await.unwrap();
    let cure = "ALTER TABLE first REPLICA IDENTITY FULL";
    case.refused(4, &["partition first of public.people", "(id)", cure]).await;
    // More than the key is as good.
    let more = "CREATE UNIQUE INDEX more ON first (name, id); ALTER TABLE first REPLICA IDENTITY USING INDEX more";
    for identity in [cure, more] {
        case.client.batch_execute(identity).await.unwrap();
        case.starts().await;
        let change = "UPDATE people SET name = name || '!'; INSERT INTO people VALUES (2, 'Grace'); DELETE FROM people WHERE id = 2";
        case.client.batch_execute(change).await.unwrap();
        case.starts().await;
    }
}
