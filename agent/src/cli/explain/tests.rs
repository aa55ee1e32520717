use std::path::PathBuf;

use serde_json::json;

use super::*;

const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {env: prod}}
---
apiVersion: v1
kind: Namespace
metadata: {name: db}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
status: {podIP: 10.244.1.7}
---
apiVersion: v1
kind: Pod
metadata: {name: pg-0, namespace: db, labels: {app: pg}}
spec: {containers: [{ports: [{name: sql, containerPort: 5432}]}]}
status: {podIP: 10.244.2.9}
---
apiVersion: v1
kind: Pod
metadata: {name: starting, namespace: db, labels: {app: new}}
---
apiVersion: v1
kind: Pod
metadata: {name: ended, namespace: db}
status: {phase: Succeeded, podIP: 10.244.1.7}
---
apiVersion: v1
kind: Pod
metadata: {name: twin, namespace: db}
status: {podIP: 10.244.1.7}
---
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDR: 10.244.0.0/16}
---
apiVersion: v1
kind: Service
metadata: {name: pg, namespace: db}
spec: {clusterIP: 10.96.0.12, selector: {app: pg}, ports: [{port: 15432, targetPort: sql}]}
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: db}
spec: {clusterIP: 10.96.0.13, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: lost, namespace: db}
spec: {clusterIP: 10.96.0.14, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
addressType: IPv4
metadata: {name: outside-x, namespace: db, labels: {kubernetes.io/service-name: outside}}
endpoints: [{addresses: [198.51.100.3]}]
ports: [{name: http, port: 8080}, {name: other, port: 9}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: pg, namespace: db}
spec:
  podSelector: {matchLabels: {app: pg}}
  ingress: [{from: [{namespaceSelector: {matchLabels: {team: shop}}}], ports: [{port: 5432}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: broken, namespace: shop}
spec: {podSelector: {}, egress: [{ports: [{port: 9, endPort: 1}]}]}
";

/// Runs `whydrop explain` on the objects above.
fn explained(flags: &str) -> (Result<u8, String>, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("objects.yaml");
    std::fs::write(&path, OBJECTS).unwrap();
    run_on(flags, &[path])
}

fn run_on(flags: &str, objects: &[PathBuf]) -> (Result<u8, String>, String) {
    let line = format!("whydrop explain {flags}");
    let words = line.split_whitespace().map(std::ffi::OsString::from);
    let cli = crate::cli::config::parse(words).unwrap();
    let crate::cli::config::Command::Explain(mut args) = cli.command else {
        panic!("{flags}");
    };
    args.objects = objects.to_vec();
    let mut out = Vec::new();
    let code = explain(&args, &mut out).map_err(|e| sentence(&e));
    (code, String::from_utf8(out).unwrap())
}

fn json_of(flags: &str) -> Value {
    let (_, out) = explained(&format!("{flags} -o json"));
    serde_json::from_str(&out).unwrap()
}

#[test]
fn a_denial_is_explained_in_text_and_json_with_code_1() {
    let (code, text) = explained("shop/web db/pg-0 --port 5432");
    assert_eq!(code, Ok(1));
    for part in [
        "shop/web → db/pg-0  TCP 5432: DENIED",
        "1. silent or refused?                  not observed: no agent was asked",
        "pods and policies from files",
        "2. is the destination isolated?        yes, by db/pg",
        "7. policyTypes and CNI?",
        "namespace-label-missing",
        "kubectl label namespace shop team=shop",
        "admits beside this: nothing else",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let json = json_of("shop/web db/pg-0 --port 5432");
    assert_eq!(json["allowed"], false);
    assert_eq!(json["observed"], Value::Null);
    assert_eq!(json["objects"], json!({"from": "files"}));
    assert_eq!(json["ingress"]["verdict"], "deny");
    assert_eq!(json["ingress"]["policies"][0], "db/pg");
    assert_eq!(json["ingress"]["rules"][0]["failed"], "peer-namespace");
    assert_eq!(
        json["ingress"]["rules"][0]["rule"],
        "spec.ingress[0].from[0]"
    );
    assert_eq!(json["egress"]["verdict"], "allow");
    let finding = &json["findings"][0];
    assert_eq!(finding["code"], "namespace-label-missing");
    assert!(finding["fix"].as_str().unwrap().starts_with("apiVersion: "));
}

#[test]
fn an_allowed_connection_ends_with_0() {
    let (code, text) = explained("db/pg-0 shop/web --port 80 -o yaml");
    assert_eq!(code, Ok(0));
    assert!(text.contains("allowed: true"), "{text}");
}

#[test]
fn a_service_is_resolved_to_its_backends_and_their_ports() {
    for dst in ["svc/db/pg", "10.96.0.12"] {
        let json = json_of(&format!("shop/web {dst} --port 15432"));
        assert_eq!(json["service"], "db/pg");
        assert_eq!(json["port"], 5432);
        assert_eq!(json["backends"][0]["backend"], "db/pg-0");
        assert_eq!(json["backends"][0]["verdict"], "deny");
    }
    // Without a selector its endpoints count, and of those the ports of the same name.
    let json = json_of("shop/web svc/db/outside");
    assert_eq!(
        (&json["port"], &json["destination"]["ip"]),
        (&json!(8080), &json!("198.51.100.3"))
    );
}

#[test]
fn what_cannot_be_told_is_said_in_a_sentence() {
    for (flags, part) in [
        ("shop/web db/none", "no pod db/none"),
        ("shop/web db/ended", "has ended"),
        ("shop/web svc/db/none", "no Service db/none"),
        ("shop/web svc/db/lost", "has no selector"),
        ("shop/web svc/db/pg --port 1", "no TCP port 1, but 15432"),
        ("svc/db/pg shop/web", "a Service is no source"),
        ("10.96.0.12 shop/web", "nothing connects from there"),
        ("shop/web pg", "expected namespace/pod"),
        ("shop/web", "a source and a destination"),
    ] {
        let (code, _) = explained(flags);
        let error = code.unwrap_err();
        assert!(error.contains(part), "{flags}: {error}");
    }
    let (code, _) = run_on("shop/web db/pg-0", &[]);
    assert!(code.unwrap_err().contains("--objects"));
}

#[test]
fn what_is_odd_about_the_ends_is_noted() {
    for (flags, part) in [
        ("shop/web db/starting --port 1", "has no address yet"),
        ("10.244.1.7 db/pg-0 --port 1", "db/twin"),
        (
            "10.244.9.9 db/pg-0 --port 1",
            "inside the nodes' pod ranges",
        ),
        ("203.0.113.7 db/pg-0 --port 1", "taken for external"),
        ("shop/web db/pg-0", "5432 is the only TCP port"),
        ("shop/web db/starting", "every TCP port"),
        (
            "shop/web db/pg-0",
            "NetworkPolicy shop/broken spec.egress[0].ports[0].endPort",
        ),
    ] {
        let (_, text) = explained(flags);
        assert!(text.contains(part), "{flags}: no {part:?} in\n{text}");
    }
    assert_eq!(
        json_of("10.244.9.9 db/pg-0 --port 1")["source"]["kind"],
        "unknown"
    );
    assert_eq!(
        json_of("shop/web db/pg-0 --protocol ICMP")["allowed"],
        Value::Null
    );
}

#[test]
fn many_flows_are_answered_line_by_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flows");
    let run = |flows: &str| {
        std::fs::write(&file, flows).unwrap();
        let (code, out) = explained(&format!("--flows {} -o json", file.display()));
        let lines = out.lines().map(|l| serde_json::from_str(l).unwrap());
        (code, lines.collect::<Vec<Value>>())
    };
    let denied =
        r#"{"src":"shop/web","dst":"db/pg-0","protocol":"TCP","port":5432,"expect":"deny"}"#;
    let allowed =
        r#"{"src":"db/pg-0","dst":"10.244.2.77","protocol":"UDP","port":1,"expect":"allow"}"#;
    let (code, lines) = run(&format!("{denied}\n\n{allowed}\n"));
    assert_eq!((code, lines.len()), (Ok(0), 2));
    assert_eq!(
        (&lines[0]["allowed"], &lines[1]["allowed"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(lines[0]["findings"][0]["code"], "namespace-label-missing");
    // A broken line is answered with an error, and the rest as if it were not there.
    let broken = "{\"src\":\n{\"src\":\"a/b\",\"dst\":\"c/d\"}\n\u{fffd}";
    let (code, lines) = run(&format!("{denied}\n{broken}\n{allowed}"));
    assert_eq!((code, lines.len()), (Ok(2), 5));
    for line in &lines[1..4] {
        assert!(
            line["error"].is_string() && line.get("allowed").is_none(),
            "{line}"
        );
    }
    assert_eq!(lines[4]["met"], true);
    let (code, lines) = run(&denied.replace("\"deny\"", "\"allow\""));
    assert_eq!((code, &lines[0]["met"]), (Ok(1), &json!(false)));
}

#[test]
fn names_that_a_terminal_would_obey_are_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("objects.json");
    let pod = |name: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "n"},
               "status": {"podIP": "10.0.0.1"}})
    };
    let list = Value::Array(vec![pod("a\u{1b}[2J"), pod("b")]);
    std::fs::write(&path, list.to_string()).unwrap();
    for output in ["text", "json", "yaml"] {
        let (code, text) = run_on(
            &format!("10.0.0.1 n/b --port 1 -o {output}"),
            std::slice::from_ref(&path),
        );
        assert_eq!(code, Ok(0));
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}

#[test]
fn a_rule_of_a_tier_is_named_with_what_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("objects.yaml");
    let tier = "---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: closed}
spec:
  tier: Admin
  priority: 5
  subject: {namespaces: {}}
  ingress:
  - {name: no-sql, action: Deny, from: [{namespaces: {}}], protocols: [{destinationNamedPort: sql}]}
";
    std::fs::write(&path, format!("{OBJECTS}{tier}")).unwrap();
    let paths = [path];
    let (code, text) = run_on("shop/web db/pg-0 --port 5432", &paths);
    assert_eq!(code, Ok(1));
    let rule = "ingress rule 1 \"no-sql\" of ClusterNetworkPolicy closed (Admin tier, priority 5)";
    for part in [
        &format!("no: {rule} says Deny"),
        "admin-tier-denied: ",
        "action: Accept",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let (_, out) = run_on("shop/web db/pg-0 --port 5432 -o json", &paths);
    let json: Value = serde_json::from_str(&out).unwrap();
    let tier = &json["ingress"]["tiers"][0];
    assert_eq!(
        (&tier["policy"], &tier["rule"], &tier["decides"]),
        (&json!("closed"), &json!("spec.ingress[0]"), &json!(true))
    );
    // Another port is for the NetworkPolicy to say, and why the tier does not is there too.
    let (_, out) = run_on("shop/web db/pg-0 --port 80 -o json", &paths);
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["ingress"]["tiers"][0]["failed"], "port");
    assert_eq!(json["ingress"]["tiers"][0]["decides"], Value::Null);
}

#[test]
fn a_broken_file_is_no_ground_for_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("objects.yaml");
    std::fs::write(&path, "a: [").unwrap();
    let (code, _) = run_on("a/b c/d", &[path]);
    assert!(code.unwrap_err().contains("no YAML"));
}

#[test]
fn proposed_policies_are_laid_against_connections_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let objects = PathBuf::from(path("objects.yaml", OBJECTS));
    // pg-0 connects to web, which nothing isolates.
    let connections = path(
        "connections",
        "{\"source\":{\"ip\":\"10.244.2.9\"},\
          \"destination\":{\"namespace\":\"shop\",\"pod\":\"web\",\"port\":80}}\n\
         {\"node\":\"n\",\"time\":\"2026-01-01T00:00:00Z\",\"conntrack\":\"read\",\
          \"connections\":1}\n",
    );
    let nobody = path(
        "nobody.yaml",
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody, namespace: shop}
spec: {podSelector: {}}
",
    );
    let everyone = path(
        "everyone.yaml",
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: everyone, namespace: shop}
spec: {podSelector: {}, ingress: [{}]}
",
    );
    let run = |flags: &str| run_on(flags, std::slice::from_ref(&objects));
    let of =
        |with: &str, more: &str| run(&format!("--connections {connections} --with {with}{more}"));
    let (code, text) = of(&nobody, "");
    assert_eq!(code, Ok(1));
    assert!(
        text.contains("ingress would be denied by shop/nobody"),
        "{text}"
    );
    let (code, json) = of(&nobody, " -o json");
    assert_eq!(code, Ok(1));
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["denied"][0]["connections"], 1);
    let (code, text) = of(&everyone, "");
    assert_eq!(code, Ok(0));
    assert!(text.starts_with("None of 1 connection (1 flow)"), "{text}");
    assert_eq!(of(&format!("{nobody} {everyone}"), "").0, Ok(0));
    // What keeps it from being judged is an error, not a verdict.
    let error = of(&everyone, " --without db/none").0.unwrap_err();
    assert!(error.contains("no such NetworkPolicy"), "{error}");
    let error = run(&format!("--connections {nobody} --with {nobody}"))
        .0
        .unwrap_err();
    assert!(
        error.contains("nobody.yaml: line 1 is no connection"),
        "{error}"
    );
    let error = run(&format!("--with {nobody} --socket /nowhere/agent.sock"))
        .0
        .unwrap_err();
    assert!(error.contains("no whydrop agent answers"), "{error}");
    // Nothing was seen: nothing is known; and where nobody could look, that is no answer.
    let empty = path("empty", "");
    let (code, text) = run(&format!("--connections {empty} --with {nobody}"));
    assert_eq!(code, Ok(0));
    assert!(text.starts_with("No connection was seen"), "{text}");
    let off = path(
        "off",
        "{\"node\":\"n\",\"time\":\"2026-01-01T00:00:00Z\",\"conntrack\":\"not in use\",\"connections\":0}",
    );
    assert_eq!(
        run(&format!("--connections {off} --with {nobody}")).0,
        Ok(2)
    );
}
