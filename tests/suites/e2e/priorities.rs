//! What is kept for those who matter more.

use fusebox_proto::v1::{AcquireRequest, Priority, Reason};

use crate::{
    ask,
    caller::{Caller, Said, said, seconds, serve},
    request,
};

const RESERVES: &str =
    "api: {token_bucket: {limit: 100, per: 100s}, reserves: {critical: 20%, normal: 10%}},
    calls: {concurrency: {limit: 10}, reserves: {critical: 15%}}";

fn by(priority: Priority, policy: &str, cost: u64) -> AcquireRequest {
    AcquireRequest { priority: priority.into(), ..request([ask(policy, "a", cost)]) }
}

async fn ask_by(caller: &mut Caller, priority: Priority, policy: &str, cost: u64) -> Said {
    said(&caller.acquire(by(priority, policy, cost)).await.verdicts[0])
}

#[tokio::test]
async fn the_lower_leave_what_is_reserved_for_the_higher() {
    let server = serve(RESERVES).await;
    let mut caller = Caller::of(&server).await;
    let bulk = ask_by(&mut caller, Priority::Bulk, "api", 70).await;
    assert_eq!((bulk.allowed, bulk.limit, bulk.remaining), (true, 70, 0));
    let bulk = ask_by(&mut caller, Priority::Bulk, "api", 1).await;
    assert_eq!((bulk.allowed, bulk.reason), (false, Reason::ReservedForPriority));
    assert_eq!(bulk.retry_after, Some(seconds(1)), "there is one above the 30 then");

    let normal = ask_by(&mut caller, Priority::Unspecified, "api", 9).await;
    assert_eq!((normal.allowed, normal.limit, normal.remaining), (true, 80, 1));
    let normal = ask_by(&mut caller, Priority::Normal, "api", 2).await;
    assert_eq!((normal.reason, normal.remaining), (Reason::ReservedForPriority, 1));

    let critical = ask_by(&mut caller, Priority::Critical, "api", 21).await;
    assert_eq!((critical.allowed, critical.limit, critical.remaining), (true, 100, 0));
    let critical = ask_by(&mut caller, Priority::Critical, "api", 1).await;
    assert_eq!((critical.reason, critical.retry_after), (Reason::RateLimited, Some(seconds(1))));
    let normal = ask_by(&mut caller, Priority::Normal, "api", 1).await;
    assert_eq!((normal.reason, normal.retry_after), (Reason::RateLimited, Some(seconds(21))));
    server.stop().await.unwrap();
}

#[tokio::test]
async fn permits_are_reserved_as_well_and_rounded_up() {
    let server = serve(RESERVES).await;
    let mut caller = Caller::of(&server).await;
    assert!(ask_by(&mut caller, Priority::Normal, "calls", 8).await.allowed);
    let normal = ask_by(&mut caller, Priority::Normal, "calls", 1).await;
    assert_eq!((normal.reason, normal.limit), (Reason::ReservedForPriority, 8));
    assert!(ask_by(&mut caller, Priority::Critical, "calls", 2).await.allowed);
    let critical = ask_by(&mut caller, Priority::Critical, "calls", 1).await;
    assert_eq!(critical.reason, Reason::ConcurrencyLimited);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn what_is_never_possible_depends_on_who_asks() {
    let server = serve(RESERVES).await;
    let mut caller = Caller::of(&server).await;
    for (priority, most) in
        [(Priority::Bulk, 70), (Priority::Normal, 80), (Priority::Critical, 100)]
    {
        let refused = caller.refused(by(priority, "api", most + 1)).await;
        let words = format!("asks[0].cost: a cost of {} is never possible", most + 1);
        assert!(refused.starts_with(&words), "{refused}");
        assert!(refused.ends_with(&format!("grants at most {most} at once")), "{refused}");
    }
    assert_eq!(ask_by(&mut caller, Priority::Critical, "api", 0).await.remaining, 100);
    assert!(ask_by(&mut caller, Priority::Critical, "api", 100).await.allowed);
    server.stop().await.unwrap();
}
