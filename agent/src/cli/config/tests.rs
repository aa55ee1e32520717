use super::*;
use crate::selection::Selection;

fn cli(line: &str) -> Result<Cli, clap::Error> {
    parse(line.split_whitespace().map(OsString::from))
}

fn tail(flags: &str) -> TailArgs {
    match cli(&format!("whydrop tail {flags}")).unwrap().command {
        Command::Tail(args) => args,
        other => panic!("{other:?}"),
    }
}

fn agent(flags: &str) -> AgentArgs {
    match cli(&format!("whydrop agent {flags}")).unwrap().command {
        Command::Agent(args) => args,
        other => panic!("{other:?}"),
    }
}

fn wrong(line: &str) -> String {
    let error = cli(line).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{line}");
    error.to_string()
}

#[test]
fn the_commands_are_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn not_negates_the_one_selection_behind_it() {
    let expected = |query: &[(&str, &str)]| Selection::from_query(query.iter().copied()).unwrap();
    for (flags, query) in [
        ("", &[] as &[_]),
        (
            "-n shop --port 80",
            &[("namespace", "shop"), ("port", "80")],
        ),
        ("--not --pod a/b", &[("not.pod", "a/b")]),
        (
            "--not --pod=a/b --port 1",
            &[("not.pod", "a/b"), ("port", "1")],
        ),
        ("--not -n x", &[("not.namespace", "x")]),
        ("--not -nx", &[("not.namespace", "x")]),
        (
            "-f --pod a/b --not --pod a/c",
            &[("pod", "a/b"), ("not.pod", "a/c")],
        ),
        (
            "--not --port 1 --port 2 --not --port 3 -o json --kind syn",
            &[
                ("not.port", "1"),
                ("port", "2"),
                ("not.port", "3"),
                ("kind", "syn"),
            ],
        ),
    ] {
        assert_eq!(
            tail(flags).selection.0,
            in_order(expected(query), flags),
            "{flags}"
        );
    }
}

/// Flags of different names may be told in another order.
fn in_order(selection: Selection, flags: &str) -> Selection {
    let mut query: Vec<_> = selection.to_query().collect();
    query.sort_by_key(|(_, value)| flags.find(value.as_str()));
    Selection::from_query(query).unwrap()
}

#[test]
fn not_without_a_selection_behind_it_is_wrong() {
    for flags in [
        "--not",
        "--port 1 --not",
        "--not -f --port 1",
        "--not --not --port 1",
    ] {
        let error = wrong(&format!("whydrop tail {flags}"));
        assert!(error.contains("--not negates"), "{flags}: {error}");
    }
}

#[test]
fn bad_usage_is_told_and_ends_with_2() {
    for (line, part) in [
        ("whydrop", "Usage: whydrop"),
        (
            "whydrop tail --port http",
            "--port \"http\": expected a port",
        ),
        ("whydrop tail --since yesterday", "expected an age"),
        ("whydrop tail --time-format %!", "%!"),
        ("whydrop tail -o xml", "compact"),
        (
            "whydrop agent --cluster minikube",
            "[possible values: auto, kube, none]",
        ),
        ("whydrop agent --map-memory 0", "more than 0"),
        ("whydrop agent --series-ttl 15", "with its unit"),
        ("whydrop agent --max-series 0", "1.."),
        ("whydrop agent --listen :9742", "as 127.0.0.1:9742"),
    ] {
        let error = wrong(line);
        assert!(error.contains(part), "{line}: {error}");
    }
}

#[test]
fn defaults_are_those_of_the_contract() {
    let args = agent("");
    assert_eq!(args.listen.to_string(), "127.0.0.1:9742");
    assert_eq!(args.socket, PathBuf::from("/run/whydrop/agent.sock"));
    assert_eq!(args.map_memory, Size(32 << 20));
    assert_eq!(args.max_series, 10_000);
    assert_eq!(args.series_ttl, Duration::from_secs(900));
    assert_eq!((args.cluster, args.labels), (Cluster::Auto, Labels::Pod));
    assert!(!args.node_name().unwrap().is_empty());
    let args = agent("--objects a --objects b --node-name n");
    assert_eq!(args.objects.len(), 2);
    assert_eq!(args.node_name().unwrap(), "n");
}

#[test]
fn every_flag_has_its_variable() {
    let command = Cli::command();
    for command in std::iter::once(&command).chain(command.get_subcommands()) {
        for arg in command.get_arguments() {
            if arg.is_positional() {
                continue;
            }
            let name = arg.get_long().unwrap();
            // Means nothing without the flag behind it.
            if name == "not" {
                continue;
            }
            // The agent's `--cluster auto|kube|none` is another flag than kubectl's.
            let is_kubectls = name == "cluster" && command.get_name() != "agent";
            let prefix = if is_kubectls {
                "WHYDROP_KUBE_"
            } else {
                "WHYDROP_"
            };
            let variable = format!("{prefix}{}", name.replace('-', "_").to_uppercase());
            assert_eq!(
                arg.get_env().and_then(|v| v.to_str()),
                Some(&*variable),
                "{name}"
            );
        }
    }
}

#[test]
fn flags_may_stand_before_the_command() {
    let parsed = |line: &str| format!("{:?}", cli(line).unwrap());
    for (before, behind) in [
        (
            "kubectl-whydrop --context x -n shop tail -f --cluster c",
            "kubectl-whydrop tail -f --context x -n shop --cluster c",
        ),
        (
            "whydrop --kubeconfig k -v status --context x",
            "whydrop status -v --kubeconfig k --context x",
        ),
        (
            "whydrop --cluster kube agent",
            "whydrop agent --cluster kube",
        ),
        (
            "whydrop --server https://a explain a/b c/d",
            "whydrop explain a/b c/d --server https://a",
        ),
    ] {
        assert_eq!(parsed(before), parsed(behind), "{before}");
    }
    // What the command does not know is as wrong as behind it.
    let error = wrong("whydrop --context x agent");
    assert!(error.contains("unexpected argument '--context'"), "{error}");
    let error = wrong("kubectl-whydrop --context x tial");
    assert!(error.contains("unrecognized subcommand 'tial'"), "{error}");
    let error = wrong("kubectl-whydrop --context x");
    assert!(error.contains("Usage: kubectl whydrop"), "{error}");
}

#[test]
fn as_a_plugin_it_is_called_kubectl_whydrop() {
    for (program, usage) in [
        ("/usr/bin/whydrop", "Usage: whydrop tail"),
        ("/usr/bin/kubectl-whydrop", "Usage: kubectl whydrop tail"),
    ] {
        let help = cli(&format!("{program} tail --help")).unwrap_err();
        assert_eq!(help.exit_code(), 0);
        assert!(help.to_string().contains(usage), "{help}");
    }
}
