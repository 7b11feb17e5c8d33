//! A real Elasticsearch or OpenSearch: one node on loopback, out of what its maker publishes for Maven.
//!
//! These builds are the server itself with fewer modules. They are fetched once, by `mvn`, and kept unpacked.

use std::fs::{self, Permissions};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use etcetera::BaseStrategy;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};
use sha2::{Digest, Sha256};

use super::process::{free_port, http};

/// What the tests are about: the server, its oldest and newest Java, and the SHA-256 of the build.
const SERVERS: [(&str, [u32; 2], &str); 5] = [
    ("elasticsearch:7.17.29", [11, 22], "841ee00be1a72ba8e707b5a2fb55f23fe7a4184369b4585393238b1c903eedaf"),
    ("elasticsearch:8.19.21", [17, 99], "215d5f3dbf0609a149f6218a9e47b6ae2df34ebbff3c5754e35f15a5e5393c8a"),
    ("elasticsearch:9.5.3", [21, 99], "bec49f3b8d00e75c8d1cec85c35298635ec9fbd3ae80ef5aeb6bc05abdb3db2d"),
    ("opensearch:2.19.6", [11, 23], "71d6d8b1c637f3faecda0752b184b1cc526fc6eaad59ec1408c6327bb00b9293"),
    ("opensearch:3.6.0", [21, 99], "a91faa1dc1cadc78cb278b4f63847e19e1627a4e9de698e14e7efc14ee37b286"),
];

/// The one that is taken where `PGTIDE_ES` names none.
const USUAL: &str = "elasticsearch:9.5.3";

/// What may pass until a node answers: it shares its cores with the other tests.
const START: Duration = Duration::from_secs(240);

/// Kills the node's process group and removes its folder when the pipe that only we hold is closed: by our death of
/// whatever kind.
const WATCHDOG: &str = r#"read -r _; kill -s KILL -- "-$1"; rm -rf -- "$2""#;

/// An unpacked build, and the Java for it.
#[derive(Clone, Debug)]
pub struct Installation {
    /// `elasticsearch` or `opensearch`.
    pub product: String,
    /// Its version, such as `9.5.3`.
    pub version: String,
    home: PathBuf,
    java: PathBuf,
}

impl Installation {
    /// The server that `PGTIDE_ES` names, such as `opensearch:3.6.0`. Fetches it where no earlier call did.
    ///
    /// # Errors
    /// Why there is none to be had: no such server, no Java for it, no Maven, no network.
    pub fn find() -> Result<Self, String> {
        let name = std::env::var("PGTIDE_ES").unwrap_or_else(|_| USUAL.to_owned());
        let known = SERVERS.into_iter().find(|(known, ..)| *known == name);
        let names = SERVERS.map(|(name, ..)| name).join(", ");
        let (_, [oldest, newest], sha256) =
            known.ok_or_else(|| format!("PGTIDE_ES={name} is none of the servers that are known: {names}"))?;
        let (product, version) = name.split_once(':').expect("a name and a version");
        let java = java(oldest, newest).ok_or_else(|| {
            format!("{name} needs a JDK of version {oldest} to {newest}, in JAVA_HOME or /usr/lib/jvm")
        })?;
        let cache = cache_folder();
        let found = Self {
            product: product.to_owned(),
            version: version.to_owned(),
            home: cache.join(format!("{product}-{version}")),
            java,
        };
        if !found.home.is_dir() {
            found.fetch(&cache, sha256)?;
        }
        Ok(found)
    }

    /// Whether it is OpenSearch.
    pub fn is_opensearch(&self) -> bool {
        self.product == "opensearch"
    }

    /// The first number of the version.
    pub fn major(&self) -> u32 {
        self.version.split('.').next().and_then(|text| text.parse().ok()).expect("a version")
    }

    /// It appears under its name only when it is whole; two at once do the work twice.
    fn fetch(&self, cache: &Path, sha256: &str) -> Result<(), String> {
        eprintln!("fetching {} {} into {}", self.product, self.version, cache.display());
        let failed = |error: std::io::Error| format!("{} cannot be filled: {error}", cache.display());
        fs::create_dir_all(cache).map_err(failed)?;
        let folder = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(Permissions::from_mode(0o755))
            .tempdir_in(cache)
            .map_err(failed)?;
        let group = if self.is_opensearch() { "org.opensearch" } else { "org.elasticsearch" };
        let artifact = format!("{group}.distribution.integ-test-zip:{}:{}:zip", self.product, self.version);
        let mut maven = Command::new("mvn");
        maven.args(["-B", "-q", "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"]);
        maven.args([format!("-Dartifact={artifact}"), format!("-DoutputDirectory={}", folder.path().display())]);
        run(maven.arg("-Dmdep.useBaseVersion=true"))?;
        let zip = folder.path().join(format!("{}-{}.zip", self.product, self.version));
        let digest = Sha256::digest(fs::read(&zip).map_err(failed)?);
        let found: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        if found != sha256 {
            return Err(format!("the SHA-256 of {artifact} is {found}, not {sha256}"));
        }
        run(Command::new(self.java.join("bin/jar")).arg("xf").arg(&zip).current_dir(folder.path()))?;
        let unpacked = zip.with_extension("");
        fs::create_dir_all(unpacked.join("plugins")).map_err(failed)?;
        // jar keeps no permissions.
        run(Command::new("chmod").args(["-R", "a+rX"]).arg(&unpacked))?;
        run(Command::new("chmod").args(["-R", "a+x"]).arg(unpacked.join("bin")))?;
        match fs::rename(&unpacked, &self.home) {
            Err(error) if !self.home.is_dir() => Err(failed(error)),
            _ => Ok(()),
        }
    }
}

/// `~/.cache/pgtide`. Root's home is closed to the user that the node runs as.
fn cache_folder() -> PathBuf {
    let own = etcetera::choose_base_strategy().ok().map(|base| base.cache_dir());
    let base = if geteuid().is_root() { None } else { own };
    base.unwrap_or_else(|| PathBuf::from("/var/cache")).join("pgtide")
}

/// The oldest JDK that serves.
fn java(oldest: u32, newest: u32) -> Option<PathBuf> {
    let installed = fs::read_dir("/usr/lib/jvm").into_iter().flatten().flatten().map(|entry| entry.path());
    let homes = std::env::var_os("JAVA_HOME").map(PathBuf::from).into_iter().chain(installed);
    let serves = homes.filter(|home| home.join("bin/jar").is_file()).filter_map(|home| {
        let release = fs::read_to_string(home.join("release")).ok()?;
        let version = release.lines().find_map(|line| line.strip_prefix("JAVA_VERSION="))?.trim_matches('"');
        let major: u32 = version.split(['.', '-', '+']).next()?.parse().ok()?;
        (oldest..=newest).contains(&major).then_some((major, home))
    });
    serves.min().map(|(_, home)| home)
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    match command.stdin(Stdio::null()).output() {
        Err(error) => Err(format!("{program} does not run: {error}")),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            Err(format!("{program}: {}: {}", output.status, text.lines().take(5).collect::<Vec<_>>().join(" / ")))
        }
    }
}

/// A running node. Its port and its data stay over restarts. It ends with this value, and with this process.
pub struct Node {
    /// What it runs.
    pub installation: Installation,
    port: u16,
    settings: Vec<(String, String)>,
    // Before the folder, so that it ends first.
    running: Option<Running>,
    folder: tempfile::TempDir,
}

impl Node {
    /// A new node with no index; `settings` are added to those of the file. Returns when it answers.
    pub async fn start(installation: Installation, settings: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut node = Self { installation, port: free_port(), settings: Vec::new(), running: None, folder };
        node.launch(settings).await;
        node
    }

    /// It runs with these settings, restarted if need be. A test that failed may have left it otherwise.
    pub async fn ensure(&mut self, settings: &[(&str, &str)]) {
        let same =
            self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).eq(settings.iter().copied());
        let runs = self.running.as_mut().is_some_and(|running| running.child.try_wait().unwrap().is_none());
        if runs && same {
            return;
        }
        if self.running.is_some() {
            self.end(Signal::SIGTERM).await;
        }
        self.launch(settings).await;
    }

    /// Starts it again as it was.
    pub async fn relaunch(&mut self) {
        let settings = self.settings.clone();
        let settings: Vec<_> = settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        self.launch(&settings).await;
    }

    /// Its URL, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The end of what it has printed.
    fn output(&self) -> String {
        let text = fs::read(self.folder.path().join("output.txt")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Ends it: orderly by TERM, at once by KILL. Returns when it has let go of its port.
    pub async fn end(&mut self, signal: Signal) {
        let mut running = self.running.take().expect("it does not run");
        running.signal(signal);
        let deadline = Instant::now() + START;
        // The process that we started may only be the launcher of the server.
        while running.child.try_wait().unwrap().is_none()
            || TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).is_err()
        {
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts it on its data, with these settings and no others of an earlier start. Returns when it answers.
    async fn launch(&mut self, settings: &[(&str, &str)]) {
        assert!(self.running.is_none(), "it runs");
        self.settings = settings.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        self.configure();
        self.running = Some(Running::spawn(&self.installation, self.folder.path()));
        let client = http();
        let health = format!("{}/_cluster/health?wait_for_status=yellow&timeout=1s", self.url());
        let deadline = Instant::now() + START;
        loop {
            let answer = client.get(&health).timeout(Duration::from_secs(5)).send().await;
            if answer.is_ok_and(|answer| answer.status() == 200) {
                return;
            }
            let ended = self.running.as_mut().unwrap().child.try_wait().unwrap();
            assert!(ended.is_none(), "it has ended ({ended:?}):\n{}", self.output());
            assert!(Instant::now() < deadline, "it does not answer:\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn configure(&self) {
        let Installation { product, home, .. } = &self.installation;
        let folder = self.folder.path();
        let conf = folder.join("conf");
        for name in ["conf", "data", "logs", "tmp"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        // Its logs and heap dumps would go into the build's own folder.
        let options = fs::read_to_string(home.join("config/jvm.options")).unwrap();
        let elsewhere = |line: &&str| !line.contains("logs/") && !line.contains("gc") && !line.contains("HeapDump");
        fs::write(conf.join("jvm.options"), options.lines().filter(elsewhere).collect::<Vec<_>>().join("\n")).unwrap();
        fs::copy(home.join("config/log4j2.properties"), conf.join("log4j2.properties")).unwrap();
        let mut lines = vec![
            "cluster.name: pgtide-test".to_owned(),
            "node.name: one".to_owned(),
            "network.host: 127.0.0.1".to_owned(),
            format!("http.port: {}", self.port),
            "transport.port: 0".to_owned(),
            "discovery.type: single-node".to_owned(),
            format!("path.data: {}", folder.join("data").display()),
            format!("path.logs: {}", folder.join("logs").display()),
            "cluster.routing.allocation.disk.threshold_enabled: false".to_owned(),
        ];
        if !self.installation.is_opensearch() {
            lines.push("xpack.security.enabled: false".to_owned());
        }
        lines.extend(self.settings.iter().map(|(name, value)| format!("{name}: {value}")));
        fs::write(conf.join(format!("{product}.yml")), lines.join("\n")).unwrap();
    }
}

/// The node's process, or the launcher of it, which leads a process group.
struct Running {
    child: Child,
    watchdog: Child,
    /// Closed by the end of this process.
    _pipe: ChildStdin,
}

impl Running {
    fn spawn(installation: &Installation, folder: &Path) -> Self {
        let Installation { product, home, java, .. } = installation;
        let log = fs::File::options().create(true).append(true).open(folder.join("output.txt")).unwrap();
        let mut command = Command::new(home.join("bin").join(product));
        command.current_dir(home).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        let prefix = if installation.is_opensearch() { "OPENSEARCH" } else { "ES" };
        command.env_remove("JAVA_HOME").env_remove("JAVA_TOOL_OPTIONS").env("HOME", folder);
        command.env(format!("{prefix}_JAVA_HOME"), java).env(format!("{prefix}_PATH_CONF"), folder.join("conf"));
        // The second compiler does not pay within a test.
        command.env(format!("{prefix}_TMPDIR"), folder.join("tmp"));
        command.env(format!("{prefix}_JAVA_OPTS"), "-Xms512m -Xmx512m -XX:TieredStopAtLevel=1");
        if geteuid().is_root() {
            // It refuses to run as root.
            let user = ["nobody", "postgres"].iter().find_map(|name| User::from_name(name).ok().flatten());
            let user = user.expect("neither nobody nor postgres is a user here");
            run(Command::new("chown").arg("-R").arg(format!("{}:{}", user.uid, user.gid)).arg(folder)).unwrap();
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", home.display()));
        let mut watchdog = Command::new("/bin/sh");
        watchdog.args(["-c", WATCHDOG, "watchdog"]).arg(child.id().to_string()).arg(folder);
        let mut watchdog = watchdog.stdin(Stdio::piped()).process_group(0).spawn().unwrap();
        let pipe = watchdog.stdin.take().unwrap();
        Self { child, watchdog, _pipe: pipe }
    }

    fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(-i32::try_from(self.child.id()).unwrap()), signal);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // First, lest it kills the group that has this number next.
        let _ = self.watchdog.kill();
        let _ = self.watchdog.wait();
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
