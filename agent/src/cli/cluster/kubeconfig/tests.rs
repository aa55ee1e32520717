use std::path::Path;

use super::*;
use crate::cli::config::{Command, parse};

const FILE: &str = "
current-context: one
clusters:
- {name: a, cluster: {server: 'https://a:6443'}}
- {name: b, cluster: {server: 'https://b:6443'}}
users:
- {name: ann, user: {token: of-ann}}
- {name: bob, user: {username: bob, password: secret}}
contexts:
- {name: one, context: {cluster: a, user: ann}}
- {name: two, context: {cluster: b, user: bob}}
- {name: nowhere, context: {cluster: gone, user: ann}}
";

fn flags(line: &str) -> KubeArgs {
    let line = format!("kubectl-whydrop tail {line}");
    let args = line.split_whitespace().map(Into::into);
    match parse(args).unwrap().command {
        Command::Tail(args) => args.agents.kube,
        other => panic!("{other:?}"),
    }
}

/// The configuration with flags over a file; a folder of the test's own has the file.
async fn over(file: &str, line: &str) -> anyhow::Result<Config> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("config");
    std::fs::write(&path, file)?;
    let mut flags = flags(line);
    flags.kubeconfig = Some(path);
    Ok(account(&flags).await?.config)
}

#[tokio::test]
async fn flags_stand_over_the_file() {
    let with = async |line: &str| over(FILE, line).await.unwrap();
    let host = |config: &Config| config.cluster_url.host().unwrap_or_default().to_owned();
    let token = |config: &Config| {
        let user = serde_json::to_value(&config.auth_info).unwrap();
        user["token"].as_str().unwrap_or_default().to_owned()
    };

    let config = with("").await;
    assert_eq!((&*host(&config), &*token(&config)), ("a", "of-ann"));

    let config = with("--context two").await;
    assert_eq!(host(&config), "b");
    assert_eq!(config.auth_info.username.as_deref(), Some("bob"));

    let config = with("--cluster b --user ann").await;
    assert_eq!(host(&config), "b");
    assert_eq!(token(&config), "of-ann");

    let config = with("--context two --token other --as eve --as-group x --as-group y").await;
    assert_eq!(token(&config), "other");
    let user = &config.auth_info;
    assert_eq!(
        (&user.username, user.impersonate.as_deref()),
        (&None, Some("eve"))
    );
    let groups = ["x", "y"].map(str::to_owned).to_vec();
    assert_eq!(user.impersonate_groups, Some(groups));

    let line = "--context two -s http://localhost:1 --insecure-skip-tls-verify --tls-server-name c \
                --client-certificate cert --client-key key";
    let config = with(line).await;
    assert_eq!(host(&config), "localhost");
    assert!(config.accept_invalid_certs);
    assert_eq!(config.tls_server_name.as_deref(), Some("c"));
    assert_eq!(config.auth_info.client_certificate.as_deref(), Some("cert"));
    assert_eq!(config.auth_info.client_key.as_deref(), Some("key"));

    // A server and a token need nothing of the file.
    let config = over("", "--server https://c:6443 --token t").await.unwrap();
    assert_eq!(host(&config), "c");
    assert_eq!(token(&config), "t");
}

#[tokio::test]
async fn what_cannot_be_used_is_one_sentence() {
    for (file, line, part) in [
        (FILE, "--context three", "there is no context \"three\""),
        (FILE, "--context nowhere", "there is no cluster \"gone\""),
        (FILE, "--user eve", "there is no user \"eve\""),
        (FILE, "--cluster c", "there is no cluster \"c\""),
        (
            FILE,
            "--context two -s localhost:8080",
            "expected a URL, as https://",
        ),
        (
            "",
            "",
            "no current context is set; choose one with --context",
        ),
        ("clusters: {", "", "parse kubeconfig YAML"),
    ] {
        let error = format!("{:#}", over(file, line).await.unwrap_err());
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(part), "{line}: {error}");
    }
    let mut flags = flags("");
    flags.kubeconfig = Some("/nowhere/config".into());
    let error = account(&flags).await.unwrap_err().to_string();
    assert!(error.contains("/nowhere/config"), "{error}");
}

#[tokio::test]
async fn a_socket_that_is_given_is_that_agent() {
    let line = "whydrop tail --socket /x --context nowhere";
    let cli = parse(line.split_whitespace().map(Into::into)).unwrap();
    let Command::Tail(args) = cli.command else {
        panic!("{cli:?}");
    };
    match target(&args.agents).await.unwrap() {
        Target::Local(path) => assert_eq!(path, Path::new("/x")),
        other => panic!("{other:?}"),
    }
}
