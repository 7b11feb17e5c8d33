//! What a pipeline leaves in PostgreSQL, and taking it away: slot, publication, ledger. Documents are never touched; an
//! index whose first copy was cut short gets its settings back.

use tokio_postgres::Client;

use crate::config::{Config, Mode, ReplicaIdentity};
use crate::index::{Found, Indices, Product};
use crate::postgres::connect::connect;
use crate::postgres::publication::{self, Maker};
use crate::postgres::slot::{self, SlotInfo};
use crate::problem::{Problem, ProblemKind};
use crate::sink;
use crate::snapshot::{self, Recorded};
use crate::table::{TableId, quote_identifier};

/// What there is of one pipeline. While it lives no pgtide can begin to work on it, unless it is in use already.
#[derive(Debug)]
pub struct Remains {
    client: Client,
    job: String,
    /// Who works on it: nothing can be removed.
    pub in_use: Option<Problem>,
    /// Name of the slot, and what is known of it; none where there is none, or the mode has none.
    pub slot: Option<(String, SlotInfo)>,
    /// Name of the publication and who made it.
    pub publication: Option<(String, Maker)>,
    /// The ledger's rows of this pipeline, and of others.
    pub ledger: Recorded,
    /// Whether the ledger's tables can go as well: no other pipeline has anything in them.
    pub ledger_tables: bool,
    /// Tables with the replica identity that the configuration asked for: its word in SQL. It stays.
    pub identities: Vec<(TableId, &'static str)>,
}

impl Remains {
    /// Looks. Changes nothing.
    ///
    /// # Errors
    /// The slot is not ours, or PostgreSQL cannot be asked.
    pub async fn find(config: &Config) -> Result<Self, Problem> {
        let cdc = &config.cdc;
        let client = connect(cdc, "drop").await?;
        let job = config.job();
        let streams = config.mode() != Mode::SnapshotOnly;
        let slot = match streams {
            true => slot::find(&client, &cdc.slot.name).await?.map(|info| (cdc.slot.name.clone(), info)),
            false => None,
        };
        let mut in_use = None;
        if let Some((name, info)) = &slot {
            match slot::usable(name, info, &cdc.database) {
                // Lost, it is good for nothing but to be removed.
                Err(problem) if problem.kind != ProblemKind::Gap => return Err(problem),
                _ => {}
            }
            in_use = slot::free(name, info).err();
        }
        // Whoever streams for the job has both.
        if !snapshot::try_lock(&client, &job).await? {
            in_use = Some(Problem::new(
                ProblemKind::Setup,
                format!("a pgtide works on {job}"),
                "Stop it first. Nothing was removed.",
            ));
        }
        let ledger = Recorded::read(&client, &job).await?;
        let mut publication = match streams {
            true => publication::maker(&client, &cdc.publication.name, &job).await?,
            false => None,
        };
        if publication == Some(Maker::Pgtide) && ledger.tables && shared(&client, &cdc.publication.name, &job).await? {
            publication = Some(Maker::Shared);
        }
        let others = "SELECT count(*) FROM pg_catalog.pg_stat_activity
                      WHERE datname = pg_catalog.current_database() AND starts_with(application_name, 'pgtide ledger ')";
        let idle = client.query_one(others, &[]).await?.get::<_, i64>(0) == 0;
        Ok(Self {
            slot,
            publication: publication.map(|maker| (cdc.publication.name.clone(), maker)),
            // Those of who has to stop first do not count.
            ledger_tables: ledger.tables && ledger.others.is_empty() && (idle || in_use.is_some()),
            in_use,
            ledger,
            identities: identities(&client, config).await?,
            client,
            job,
        })
    }

    /// There is nothing to be removed.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        let publication = matches!(self.publication, Some((_, Maker::Pgtide)));
        self.slot.is_none() && !publication && self.ledger.rows == 0 && !self.ledger_tables
    }

    /// The name under which the ledger knows the pipeline.
    #[must_use]
    pub fn job(&self) -> &str {
        &self.job
    }

    /// Removes the slot, the publication if pgtide made it and `publication` says so, and what the ledger has. The slot
    /// first: it alone does harm by staying. Gives whether the ledger's tables went as well.
    ///
    /// # Errors
    /// It is in use. PostgreSQL refuses one of them; what stood before it in this order is gone. It can be done again.
    pub async fn remove(&self, publication: bool) -> Result<bool, Problem> {
        if let Some(problem) = &self.in_use {
            return Err(problem.clone());
        }
        if let Some((name, _)) = &self.slot {
            self.client.execute("SELECT pg_catalog.pg_drop_replication_slot($1::text::name)", &[name]).await?;
        }
        if let Some((name, Maker::Pgtide)) = &self.publication
            && publication
        {
            self.client.batch_execute(&format!("DROP PUBLICATION {}", quote_identifier(name))).await?;
        }
        if !self.ledger.tables {
            return Ok(false);
        }
        Recorded::remove(&self.client, &self.job, self.ledger_tables).await
    }
}

/// The indices that a first copy of this pipeline made ready for itself, and did not put back.
///
/// # Errors
/// Elasticsearch cannot be asked.
pub async fn hurried<'a>(config: &Config, client: &'a sink::Client) -> Result<(Indices<'a>, Vec<Found>), Problem> {
    let product = Product::of(&client.info().await?);
    let indices = Indices::new(client, product, &config.job(), config.elasticsearch.json_as);
    let mut hurried = Vec::new();
    for name in config.elasticsearch.table_index_mapping.values() {
        let found = indices.find_one(name).await?;
        hurried.extend(found.filter(|found| found.copies() && found.job() == Some(config.job().as_str())));
    }
    Ok((indices, hurried))
}

/// The ledger has tables of another job that this publication publishes.
async fn shared(client: &Client, publication: &str, job: &str) -> Result<bool, Problem> {
    // An older ledger does not have it.
    let there = "SELECT pg_catalog.to_regclass('public.cdc_snapshot_tables') IS NOT NULL";
    if !client.query_one(there, &[]).await?.get::<_, bool>(0) {
        return Ok(false);
    }
    let row = client
        .query_one(
            "SELECT EXISTS (SELECT FROM public.cdc_snapshot_tables t JOIN pg_catalog.pg_publication p ON p.pubname = $1
                            WHERE t.slot_name <> $2 AND t.definition::jsonb #>> '{publication,oid}' = p.oid::text)",
            &[&publication, &job],
        )
        .await?;
    Ok(row.get(0))
}

/// The tables whose replica identity the configuration sets, as far as they have it.
async fn identities(client: &Client, config: &Config) -> Result<Vec<(TableId, &'static str)>, Problem> {
    let mut found = Vec::new();
    for table in &config.cdc.publication.tables {
        let (letter, word) = match &table.replica_identity {
            None | Some(ReplicaIdentity::Default) => continue,
            Some(ReplicaIdentity::Full) => ("f", "FULL"),
            Some(ReplicaIdentity::Nothing) => ("n", "NOTHING"),
            Some(ReplicaIdentity::UsingIndex(_)) => ("i", "USING INDEX"),
        };
        let row = client
            .query_opt(
                "SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                 WHERE n.nspname = $1 AND c.relname = $2 AND c.relreplident::text = $3",
                &[&table.id.schema, &table.id.name, &letter],
            )
            .await?;
        if row.is_some() {
            found.push((table.id.clone(), word));
        }
    }
    Ok(found)
}
