use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

const BROKEN: &str = "apiVersion: v1\nkind: [";

fn namespaces(names: &[&str]) -> String {
    let documents = names
        .iter()
        .map(|n| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {n}}}\n"));
    documents.collect::<Vec<_>>().join("---\n")
}

/// Replaces a file in one step, as `kubectl` and editors do.
fn put(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

fn open(path: &Path) -> Files {
    let (files, problems) = Files::open(&[path.to_owned()], Arc::default()).unwrap();
    assert_eq!(problems, []);
    files
}

fn names(files: &Files) -> Vec<String> {
    let mut names: Vec<_> = files.objects().map(|o| o.key().name.to_string()).collect();
    names.sort();
    names
}

/// What comes of a change: nothing at the first look, which only notices it.
fn settle(files: &mut Files) -> Update {
    let first = files.poll();
    assert_eq!((first.changes, first.problems), (vec![], vec![]));
    files.poll()
}

fn folder(file: &str, text: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(file);
    fs::write(&path, text).unwrap();
    (folder, path)
}

#[test]
fn a_path_that_is_not_there_is_one_clear_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.yaml");
    let error = Files::open(&[missing], Arc::default()).unwrap_err();
    let sentence = error.to_string();
    assert!(
        sentence.contains("missing.yaml: No such file"),
        "{sentence}"
    );
}

#[test]
fn only_what_changed_is_told() {
    let (_folder, path) = folder("a.yaml", &namespaces(&["a", "b"]));
    let mut files = open(&path);
    assert_eq!(names(&files), ["a", "b"]);
    put(&path, &namespaces(&["b", "c"]));
    let changes = settle(&mut files).changes;
    assert!(matches!(&changes[0], Change::Delete(key) if &*key.name == "a"));
    assert!(matches!(&changes[1], Change::Upsert(o) if &*o.key().name == "c"));
    assert_eq!(changes.len(), 2);
    assert_eq!(settle(&mut files).changes, []);
}

#[test]
fn a_file_that_is_still_written_is_left_alone() {
    let (_folder, path) = folder("a.yaml", &namespaces(&["a"]));
    let mut files = open(&path);
    for n in 2..5 {
        fs::write(&path, namespaces(&["a", "b", "c", "d"][..n])).unwrap();
        assert_eq!(files.poll().changes, []);
    }
    assert_eq!(files.poll().changes.len(), 3);
}

#[test]
fn what_is_broken_empty_or_gone_leaves_the_last_good_state_and_is_said_once() {
    let (_folder, path) = folder("a.yaml", &namespaces(&["a"]));
    let errors = Arc::new(AtomicU64::new(0));
    let (mut files, _) = Files::open(std::slice::from_ref(&path), errors.clone()).unwrap();
    for (n, bad) in [Some(BROKEN), Some(""), Some("# nothing\n"), None]
        .into_iter()
        .enumerate()
    {
        match bad {
            Some(text) => put(&path, text),
            None => fs::remove_file(&path).unwrap(),
        }
        let update = settle(&mut files);
        assert_eq!(update.changes, [], "{bad:?}");
        assert_eq!(update.problems.len(), 1, "{bad:?}");
        let said = update.problems[0].to_string();
        assert!(said.contains("a.yaml") && said.contains("stay"), "{said}");
        assert_eq!(settle(&mut files).problems, [], "said again: {bad:?}");
        assert_eq!(errors.load(Ordering::Relaxed), n as u64 + 1);
        assert_eq!(names(&files), ["a"]);
    }
    put(&path, &namespaces(&["b"]));
    assert_eq!(settle(&mut files).changes.len(), 2);
}

#[test]
fn bytes_that_are_no_text_are_a_problem_of_the_file() {
    let (_folder, path) = folder("a.yaml", "");
    fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    let (files, problems) = Files::open(&[path], Arc::default()).unwrap();
    assert_eq!((names(&files).len(), problems.len()), (0, 1));
    assert!(problems[0].message.contains("nothing of it is used"));
}

#[test]
fn a_file_taken_out_of_a_folder_takes_its_objects_along() {
    let (folder, path) = folder("a.yaml", &namespaces(&["a"]));
    for (file, name) in [
        ("b.json", "b"),
        ("c.yml", "c"),
        ("d.txt", "d"),
        (".e.yaml", "e"),
    ] {
        let text = serde_json::json!(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        );
        fs::write(folder.path().join(file), text.to_string()).unwrap();
    }
    fs::create_dir(folder.path().join("sub.yaml")).unwrap();
    let mut files = open(folder.path());
    assert_eq!(names(&files), ["a", "b", "c"]);
    fs::remove_file(path).unwrap();
    let update = settle(&mut files);
    assert_eq!((update.changes.len(), update.problems), (1, vec![]));
    assert_eq!(names(&files), ["b", "c"]);
    fs::write(folder.path().join("f.yaml"), namespaces(&["f"])).unwrap();
    assert_eq!(settle(&mut files).changes.len(), 1);
    // The folder itself was named: its loss is an accident.
    fs::remove_dir_all(folder.path()).unwrap();
    let update = settle(&mut files);
    assert_eq!((update.changes.len(), update.problems.len()), (0, 1));
    assert_eq!(names(&files), ["b", "c", "f"]);
}

#[test]
fn a_config_map_is_swapped_by_its_link() {
    let mount = tempfile::tempdir().unwrap();
    let at = |name: &str| mount.path().join(name);
    for (version, name) in [("..1", "a"), ("..2", "b")] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("objects.yaml"), namespaces(&[name])).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/objects.yaml", at("objects.yaml")).unwrap();
    let (mut in_folder, mut by_name) = (open(mount.path()), open(&at("objects.yaml")));
    symlink("..2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    for files in [&mut in_folder, &mut by_name] {
        assert_eq!(names(files), ["a"]);
        settle(files);
        assert_eq!(names(files), ["b"]);
    }
}

#[test]
fn an_object_in_two_files_is_the_last_ones_and_stays_with_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let node = |ip: &str| {
        format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: n}}, \
             status: {{addresses: [{{type: InternalIP, address: {ip}}}]}}}}"
        )
    };
    let (a, b) = (folder.path().join("a.yaml"), folder.path().join("b.yaml"));
    fs::write(&a, node("10.0.0.1")).unwrap();
    fs::write(&b, node("10.0.0.2")).unwrap();
    let mut files = open(folder.path());
    let ip = |files: &Files| match files.objects().next() {
        Some(Object::Node(node)) => node.ips[0].to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(ip(&files), "10.0.0.2");
    fs::remove_file(b).unwrap();
    assert!(matches!(
        settle(&mut files).changes[..],
        [Change::Upsert(_)]
    ));
    assert_eq!(ip(&files), "10.0.0.1");
}

#[test]
fn a_malformed_object_is_skipped_alone_and_named() {
    let bad = "
apiVersion: v1
kind: Pod
metadata: {name: bad, namespace: shop}
status: {podIP: 10.244.1}
";
    let good = bad.replace("10.244.1", "10.244.1.9");
    let (_folder, path) = folder("a.yaml", &format!("{}---{bad}", namespaces(&["a"])));
    let (mut files, problems) = Files::open(std::slice::from_ref(&path), Arc::default()).unwrap();
    assert_eq!(names(&files), ["a"]);
    let [problem] = &problems[..] else {
        panic!("{problems:?}")
    };
    assert_eq!((&*problem.kind, &*problem.name), ("Pod", "shop/bad"));
    assert_eq!(
        problem.message,
        "status.podIP: invalid IP address syntax; it is skipped"
    );
    // Once it was good, that state stays when it is spoilt again.
    put(&path, &format!("{}---{good}", namespaces(&["b"])));
    assert_eq!(settle(&mut files).changes.len(), 3);
    put(&path, &format!("{}---{bad}", namespaces(&["c"])));
    let update = settle(&mut files);
    assert_eq!((update.changes.len(), update.problems.len()), (2, 1));
    assert_eq!(names(&files), ["bad", "c"]);
}

#[tokio::test]
async fn a_change_counts_within_two_seconds() {
    let (_folder, path) = folder("a.yaml", &namespaces(&["a"]));
    let files = open(&path);
    put(&path, &namespaces(&["a", "b"]));
    let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
    let mut sender = Some(sender);
    let apply = |changes: Vec<Change>| {
        assert_eq!(changes.len(), 1);
        drop(sender.take());
    };
    let shutdown = async { _ = receiver.await };
    let run = run(files, apply, shutdown);
    tokio::time::timeout(Duration::from_secs(60), run)
        .await
        .expect("the change never came")
        .unwrap();
    // Two looks, as `settle` has it: how long these take here says nothing of whydrop.
    assert!(POLL_INTERVAL * 3 < Duration::from_secs(2));
}
