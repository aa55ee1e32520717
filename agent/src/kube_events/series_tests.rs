use super::*;
use crate::event::{EndpointKind, testing};

fn series(now: Instant) -> AllSeries {
    AllSeries::new("node-a".into(), Times::default(), now)
}

/// From a pod to one of many others.
fn event(to: usize) -> Event {
    let mut event = testing::event();
    event.outcome = Outcome::Dropped;
    event.packets = 1;
    event.destination.pod = Some(format!("pg-{to}").into());
    event
}

fn created(post: Option<Post>) -> (Subject, String) {
    match post {
        Some(Post::Create { subject, note, .. }) => (subject, note),
        other => panic!("no new Event: {other:?}"),
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn repetition_is_a_series() {
    let start = Instant::now();
    let mut all = series(start);
    assert!(all.note(&event(0), start));
    assert_eq!(all.next(start), None, "it gathers first");
    let (subject, note) = created(all.next(start + SECOND));
    assert!(note.starts_with("Connections to db/pg-0 port 5432 (TCP) are dropped on node node-a"));
    assert!(note.contains("is isolated by db/default-deny"), "{note}");
    all.answered(&subject, Answer::Created("e".into()), start + SECOND);
    assert_eq!(all.next(start + 100 * SECOND), None, "nothing new");
    for second in [30, 100] {
        assert!(all.note(&event(0), start + second * SECOND));
    }
    let Some(Post::Update { name, count, .. }) = all.next(start + 100 * SECOND) else {
        panic!("no update");
    };
    assert_eq!((&*name, count), ("e", 3));
    all.answered(&subject, Answer::Updated, start + 100 * SECOND);
    assert!(all.note(&event(0), start + 101 * SECOND));
    assert_eq!(all.next(start + 399 * SECOND), None, "five minutes apart");
    assert!(all.next(start + 400 * SECOND).is_some());

    // After six silent minutes the series is over: another Event.
    let later = start + 900 * SECOND;
    assert_eq!(all.next(later), None);
    assert!(all.note(&event(0), later));
    created(all.next(later + SECOND));
}

#[test]
fn a_drop_and_the_attempt_that_it_cost_are_one() {
    let start = Instant::now();
    let mut all = series(start);
    let mut attempt = event(0);
    (attempt.outcome, attempt.cause) = (Outcome::Unanswered, Some(Cause::DroppedHere));
    let mut answered = event(0);
    answered.outcome = Outcome::Rejected;
    for event in [&event(0), &attempt, &event(0), &answered] {
        assert!(all.note(event, start));
    }
    let (subject, _) = created(all.next(start + SECOND));
    all.answered(&subject, Answer::Created("e".into()), start + SECOND);
    let Some(Post::Update { count, .. }) = all.next(start + 70 * SECOND) else {
        panic!("no update");
    };
    assert_eq!(count, 2);
}

#[test]
fn the_pod_that_suffers_is_the_sender_else_the_receiver() {
    let mut from_outside = event(0);
    from_outside.source.kind = Some(EndpointKind::External);
    (from_outside.source.namespace, from_outside.source.pod) = (None, None);
    from_outside.source.ip = "192.0.2.9".parse().ok();
    from_outside.explanation = None;
    let start = Instant::now();
    let mut all = series(start);
    assert!(all.note(&from_outside, start));
    let (subject, note) = created(all.next(start + SECOND));
    assert_eq!((&*subject.namespace, &*subject.pod), ("db", "pg-0"));
    assert!(
        note.starts_with("Connections from 192.0.2.9 to port 5432 (TCP)"),
        "{note}"
    );

    let mut nobodys = from_outside;
    (nobodys.destination.namespace, nobodys.destination.pod) = (None, None);
    assert!(all.note(&nobodys, start), "no pod suffers");
    assert_eq!(all.series.len(), 1);
}

#[test]
fn what_is_lost_elsewhere_is_not_laid_to_this_node() {
    let mut attempt = event(0);
    (attempt.outcome, attempt.cause) = (Outcome::Unanswered, Some(Cause::Elsewhere));
    (attempt.drop, attempt.explanation) = (None, None);
    let start = Instant::now();
    let mut all = series(start);
    assert!(all.note(&attempt, start));
    let (_, note) = created(all.next(start + SECOND));
    assert!(
        note.ends_with("(TCP) get no answer, and node node-a does not drop them"),
        "{note}"
    );
}

#[test]
fn requests_are_few_and_who_waits_longest_is_first() {
    let start = Instant::now();
    let mut all = series(start);
    for to in 0..20 {
        assert!(all.note(&event(to), start + SECOND * to as u32));
    }
    let now = start + 30 * SECOND;
    let mut names = Vec::new();
    while let Some(post) = all.next(now) {
        let (subject, _) = created(Some(post));
        names.push(subject.other.clone());
        all.answered(&subject, Answer::Created("e".into()), now);
    }
    let wanted: Vec<_> = (0..BURST).map(|to| format!("db/pg-{to}")).collect();
    assert_eq!(names, wanted);
    assert_eq!(all.next(now + SECOND), None);
    created(all.next(now + REFILL));
    assert_eq!(all.next(now + REFILL), None);
}

#[test]
fn what_finds_no_room_is_said() {
    let start = Instant::now();
    let mut all = series(start);
    for to in 0..MAX {
        assert!(all.note(&event(to), start));
    }
    assert!(!all.note(&event(MAX), start));
    assert!(all.note(&event(0), start), "a known one goes on");
    assert!(all.note(&event(MAX), start + OVER), "the others are over");
}

#[test]
fn what_fails_is_tried_again_and_what_is_gone_is_not() {
    let start = Instant::now();
    let mut all = series(start);
    assert!(all.note(&event(0), start));
    let now = start + SECOND;
    let (subject, _) = created(all.next(now));
    all.answered(&subject, Answer::Failed, now);
    assert_eq!(all.next(now + 29 * SECOND), None);
    created(all.next(now + 30 * SECOND));
    all.answered(&subject, Answer::Created("e".into()), now);
    // The API server has forgotten it: after an hour by default.
    all.answered(&subject, Answer::Expired, now);
    created(all.next(now));
    all.answered(&subject, Answer::Gone, now);
    assert!(all.series.is_empty());
}

#[test]
fn a_note_is_as_long_as_the_api_takes() {
    let mut long = event(0);
    if let Some(explanation) = &mut long.explanation {
        explanation.summary = "\u{e9}".repeat(2_000);
    }
    let start = Instant::now();
    let mut all = series(start);
    assert!(all.note(&long, start));
    let (_, note) = created(all.next(start + SECOND));
    assert!((NOTE_BYTES - 1..=NOTE_BYTES).contains(&note.len()));
}

#[test]
fn what_is_over_before_its_turn_is_counted() {
    let start = Instant::now();
    let mut all = series(start);
    let burst = BURST as usize;
    for to in 0..burst + 5 {
        assert!(all.note(&event(to), start));
        assert!(all.note(&event(to), start));
    }
    let mut at = start + SECOND;
    for n in 0..burst {
        let (subject, _) = created(all.next(at));
        all.answered(&subject, Answer::Created(n.to_string()), at);
    }
    assert_eq!(all.take_untold(), 0);
    at += OVER;
    assert_eq!(all.next(at), None);
    assert_eq!((all.take_untold(), all.take_untold()), (10, 0));
}
