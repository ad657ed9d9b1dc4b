//! Which descriptors share a count, and which never do.

use super::{Files, Proxy, Told, descriptor, hits, limited, loaded, peek, request, rl, rule};

#[tokio::test]
async fn keys_and_values_that_join_to_one_text_are_told_apart() {
    let pair =
        "{key: one, descriptors: [{key: two, rate_limit: {unit: hour, requests_per_unit: 5}}]}";
    let rules = [rule("a_b", 5, "hour"), rule("a", 5, "hour"), pair.to_owned()];
    let server = Files::of(&[("rl.yaml", &rl(&rules))]).serve().await;
    let mut proxy = Proxy::of(&server).await;
    for one in [
        descriptor([("a_b", "c")]),
        descriptor([("a", "b_c")]),
        descriptor([("one", "x|y"), ("two", "z")]),
        descriptor([("one", "x"), ("two", "y|z")]),
        descriptor([("one", "x%7Cy"), ("two", "z")]),
        descriptor([("one", ""), ("two", "x")]),
        descriptor([("one", "x"), ("two", "")]),
        descriptor([("a", "")]),
        descriptor([("a", "A")]),
        descriptor([("a", "e\u{301}")]),
        descriptor([("a", "\u{e9}")]),
    ] {
        assert_eq!(proxy.one(one.clone()).await, Told::Ok(4), "{one:?}");
        assert_eq!(proxy.one(one.clone()).await, Told::Ok(3), "{one:?}");
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_descriptor_meets_the_rule_of_just_its_levels() {
    let below = "{key: path, value: /, descriptors: [{key: user, rate_limit: {unit: hour, \
                 requests_per_unit: 5}}]}";
    let server = Files::of(&[("rl.yaml", &rl(&[below.to_owned(), rule("a_b", 5, "hour")]))]);
    let server = server.serve().await;
    let mut proxy = Proxy::of(&server).await;
    for (entries, expected) in [
        (vec![("path", "/"), ("user", "a")], Told::Ok(4)),
        (vec![("path", "/")], Told::Free),
        (vec![("path", "/x"), ("user", "a")], Told::Free),
        (vec![("user", "a"), ("path", "/")], Told::Free),
        (vec![("path", "/"), ("user", "a"), ("more", "b")], Told::Free),
        (vec![("a", "b")], Told::Free),
        (vec![("a_b", "")], Told::Ok(4)),
    ] {
        assert_eq!(proxy.one(descriptor(entries.clone())).await, expected, "{entries:?}");
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_more_particular_rule_counts_for_itself_from_the_start() {
    let files = Files::of(&[("rl.yaml", &rl(&[rule("user", 10, "hour")]))]);
    let server = files.serve().await;
    let mut proxy = Proxy::of(&server).await;
    assert_eq!(proxy.one(hits("user", "a", 6)).await, Told::Ok(4));
    let own = "{key: user, value: a, rate_limit: {unit: hour, requests_per_unit: 10}}";
    server.files.write("rl.yaml", &rl(&[rule("user", 10, "hour"), own.to_owned()]));
    loaded(&server, 2, 0).await;
    assert_eq!(proxy.one(hits("user", "a", 1)).await, Told::Ok(9));
    server.files.write("rl.yaml", &rl(&[rule("user", 10, "hour")]));
    loaded(&server, 3, 0).await;
    assert_eq!(proxy.one(peek("user", "a")).await, Told::Ok(4), "that one's is where it was");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn domains_count_apart_and_one_that_goes_is_unknown() {
    let other = rl(&[rule("user", 10, "hour")]).replace("domain: rl", "domain: other");
    let files = Files::of(&[("rl.yaml", &rl(&[rule("user", 10, "hour")])), ("other.yaml", &other)]);
    let server = files.serve().await;
    let mut proxy = Proxy::of(&server).await;
    let mut of_other = async |one| {
        let request = super::RateLimitRequest { domain: "other".into(), ..request([one]) };
        super::told(&proxy.send(request).await.statuses[0])
    };
    let carried = |count| limited(hits("user", "a", count), 10, super::RateLimitUnit::Hour);
    assert_eq!(of_other(hits("user", "a", 6)).await, Told::Ok(4));
    assert_eq!(of_other(carried(7)).await, Told::Ok(3));
    let mut of_rl = Proxy::of(&server).await;
    assert_eq!(of_rl.hit("user", "a").await, Told::Ok(9));
    assert_eq!(of_rl.one(carried(1)).await, Told::Ok(9));

    server.files.remove("other.yaml");
    loaded(&server, 2, 0).await;
    assert_eq!(of_other(hits("user", "a", 1)).await, Told::Free);
    assert_eq!(of_other(carried(1)).await, Told::Free);
    let unknown = "fusebox_ratelimit_unknown_domain_total";
    assert_eq!(super::metric(&server, unknown).await, Some(2));
    server.files.write("back.yaml", &other);
    loaded(&server, 3, 0).await;
    assert_eq!(of_other(peek("user", "a")).await, Told::Ok(4));
    assert_eq!(of_other(carried(0)).await, Told::Ok(3));
    server.stop().await.unwrap();
}
