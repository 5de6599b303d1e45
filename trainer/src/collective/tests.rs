//! Ranks as threads of one process, over real sockets.
#![allow(clippy::unwrap_used)]

use super::testing::{group, join, leader, together};
use super::*;
use crate::ops::gradient::GradientTree;
use crate::ops::testing::uniform;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

/// `len` elements in `world` slices, uneven where they must be.
fn slices(len: usize, world: usize) -> Vec<Range<usize>> {
    (0..world).map(|rank| len * rank / world..len * (rank + 1) / world).collect()
}

#[test]
fn sums_are_the_tree_over_ranks_and_reach_everybody() {
    for (world, len) in [(2, 10), (3, 200_001), (4, 3), (5, 70_000)] {
        let slices = slices(len, world);
        let mut tree = GradientTree::new(len, world);
        for rank in 0..world - 1 {
            tree.leaf().copy_from_slice(&uniform(rank as u64, len));
            tree.push();
        }
        let (leaf, waiting) = tree.last_leaf();
        leaf.copy_from_slice(&uniform(world as u64 - 1, len));
        waiting.add_to(leaf, 0..len);
        let expected = tree.finish().to_vec();
        let sums = together(world, |mesh: &mut dyn Collective| {
            let mut first = uniform(mesh.rank() as u64, len);
            let mut second = first.clone();
            mesh.start_reduce_scatter(&first, &slices).unwrap();
            mesh.start_reduce_scatter(&second, &slices).unwrap();
            mesh.finish_reduce_scatter(&mut first, &slices).unwrap();
            mesh.finish_reduce_scatter(&mut second, &slices).unwrap();
            mesh.start_all_gather(&first, &slices).unwrap();
            mesh.start_all_gather(&second, &slices).unwrap();
            mesh.finish_all_gather(&mut first, &slices).unwrap();
            mesh.finish_all_gather(&mut second, &slices).unwrap();
            assert!(first == second);
            first
        });
        assert!(sums.iter().all(|sum| *sum == expected), "{world} ranks, {len} elements");
    }
}

#[test]
fn messages_of_any_length_arrive_in_order() {
    let lengths = [0, 1, (1 << 18) - 1, 1 << 18, 600_000];
    together(3, |mesh: &mut dyn Collective| {
        for length in lengths {
            let all = mesh.exchange(&vec![mesh.rank() as u8; length]).unwrap();
            assert!(all.iter().enumerate().all(|(rank, message)| *message == vec![rank as u8; length]));
        }
        assert_eq!(mesh.broadcast(format!("from {}", mesh.rank()).as_bytes()).unwrap(), b"from 0");
        mesh.barrier().unwrap();
        let (next, previous) = ((mesh.rank() + 1) % 3, (mesh.rank() + 2) % 3);
        mesh.send(next, &uniform(mesh.rank() as u64, 100_000)).unwrap();
        let mut received = vec![0.0; 100_000];
        mesh.receive(previous, &mut received).unwrap();
        assert!(received == uniform(previous as u64, 100_000));
        let notes = mesh.notes().unwrap();
        notes.send(next, &vec![7; 300_000]).unwrap();
        assert_eq!(notes.receive(previous).unwrap(), vec![7; 300_000]);
    });
}

#[test]
fn a_rank_that_ends_ends_the_others_with_its_own_words() {
    let results = together(3, |mesh: &mut dyn Collective| {
        if mesh.rank() == 1 {
            mesh.leave(Some("the disk is full"));
            return "left".to_owned();
        }
        mesh.exchange(&[]).unwrap_err().to_string()
    });
    // From itself, or from the other one.
    for result in [&results[0], &results[2]] {
        assert!(
            result.contains("rank 1 is lost") || result.contains("is lost: it has failed"),
            "{results:?}"
        );
        assert!(result.contains("the disk is full"), "{results:?}");
    }
}

#[test]
fn a_rank_that_does_something_else_is_named() {
    let results = together(2, |mesh: &mut dyn Collective| match mesh.rank() {
        0 => mesh.exchange(&[]).map(drop),
        _ => mesh.send(0, &[1.0]).and_then(|()| mesh.exchange(&[]).map(drop)),
    });
    assert!(matches!(results[0], Err(CollectiveError::Protocol { rank: 1, .. })), "{results:?}");
}

/// Rank 1 as a bare socket that has made itself known, with rank 0's side of it.
fn with_bare_peer(speak: impl FnOnce(TcpStream) + Send) -> (Result<()>, Duration) {
    let (listener, address) = leader();
    let secret = Secret::random().unwrap();
    let identity = Identity("job/stage/1".to_owned());
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| {
            let mut stream = TcpStream::connect(&address).unwrap();
            let me = handshake::Introduction { rank: 1, world_size: 2, port: 1 };
            handshake::introduce(&mut stream, &secret, &identity, me).unwrap();
            // Where the two ranks are: rank 0 is done with the meeting.
            for _rank in 0..2 {
                let mut length = [0];
                stream.read_exact(&mut length).unwrap();
                stream.read_exact(&mut vec![0; length[0].into()]).unwrap();
            }
            speak(stream);
        });
        let mut mesh = join(&group(0, 2, &address, &secret), Some(listener)).unwrap();
        let begin = Instant::now();
        let result = mesh.exchange(&[]).map(drop);
        let elapsed = begin.elapsed();
        mesh.leave(result.as_ref().err().map(ToString::to_string).as_deref());
        peer.join().unwrap();
        (result, elapsed)
    })
}

#[test]
fn whatever_a_peer_sends_is_an_error_and_no_panic() {
    let header = |kind, payload_bytes| Header { kind, more: false, operation: 1, payload_bytes }.encode();
    let cases: [(&str, Vec<u8>); 5] = [
        ("begins with", b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        ("claims", header(Kind::Bytes, 1 << 30).to_vec()),
        ("kind", [&header(Kind::Bytes, 0)[..4], &[99, 0, 0, 0], &[0; 8]].concat()),
        ("at operation", [&header(Kind::Numbers, 4)[..], &[0; 4]].concat()),
        ("connection has ended", header(Kind::Bytes, 8).to_vec()),
    ];
    for (expected, bytes) in cases {
        let (result, _) = with_bare_peer(|mut stream| {
            // Rank 0 may have hung up already. Where the end of the line is not the point, it hangs up first.
            let _ = stream.write_all(&bytes);
            if !expected.contains("ended") {
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
        let message = result.unwrap_err().to_string();
        assert!(message.contains(expected), "{expected}: {message}");
    }
}

#[test]
fn a_silent_peer_is_lost_within_ten_seconds() {
    let (result, elapsed) = with_bare_peer(|mut stream| {
        // It neither speaks nor closes until rank 0 ends the line.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    assert!(result.unwrap_err().to_string().contains("silent"));
    assert!(elapsed < Duration::from_secs(8), "{elapsed:?}");
}

#[test]
fn strangers_are_refused_and_the_meeting_goes_on() {
    let (listener, address) = leader();
    let secret = Secret::random().unwrap();
    let refused = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let lead = scope.spawn(|| {
            let warn = |text: String| refused.lock().unwrap().push(text);
            let group = group(0, 2, &address, &secret);
            let mut mesh = meet(&group, Some(listener), &warn, &|| None).unwrap();
            mesh.barrier().unwrap();
            mesh.leave(None);
        });
        // Says nothing, and keeps the line.
        let _silent = TcpStream::connect(&address).unwrap();
        let mut other = TcpStream::connect(&address).unwrap();
        other.write_all(&[b'x'; 64]).unwrap();
        assert_eq!(other.read(&mut [0; 8]).unwrap_or(0), 0);
        // Another secret, another attempt: refused, and they keep trying; another world, a second rank 0: told why.
        let short = Duration::from_millis(300);
        let with = |change: &dyn Fn(&mut Group)| {
            let mut group = group(1, 2, &address, &secret);
            change(&mut group);
            join(&group, None).err().unwrap().to_string()
        };
        let wrong_secret = with(&|group| {
            (group.secret, group.patience) = (Secret::random().unwrap(), short);
        });
        assert!(wrong_secret.contains("not a rank of this attempt"), "{wrong_secret}");
        let wrong_attempt = with(&|group| {
            (group.identity, group.patience) = (Identity("job/stage/2".to_owned()), short);
        });
        assert!(wrong_attempt.contains("not a rank of this attempt"), "{wrong_attempt}");
        let wrong_world = with(&|group| (group.rank, group.world_size) = (1, 3));
        assert!(wrong_world.contains("it counts 3 ranks, but there are 2"), "{wrong_world}");
        let mut stream = TcpStream::connect(&address).unwrap();
        let second = handshake::Introduction { rank: 0, world_size: 2, port: 1 };
        let identity = Identity("job/stage/1".to_owned());
        let error = handshake::introduce(&mut stream, &secret, &identity, second).unwrap_err();
        assert!(error.to_string().contains("rank 0 does not call here"), "{error}");

        let mut mesh = join(&group(1, 2, &address, &secret), None).unwrap();
        mesh.barrier().unwrap();
        mesh.leave(None);
        lead.join().unwrap();
    });
    let refused = refused.into_inner().unwrap().join("\n");
    assert!(refused.contains("no trainer of this version") && refused.contains("3 ranks"), "{refused}");
}

#[test]
fn a_rank_is_welcome_once() {
    let (listener, address) = leader();
    let secret = Secret::random().unwrap();
    std::thread::scope(|scope| {
        let lead = scope.spawn(|| join(&group(0, 3, &address, &secret), Some(listener)).map(drop));
        let first = scope.spawn(|| join(&group(1, 3, &address, &secret), None).map(drop));
        let second = scope.spawn(|| join(&group(1, 3, &address, &secret), None).map(drop));
        // One of the two is told so; then the missing rank comes.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !first.is_finished() && !second.is_finished() {
            assert!(Instant::now() < deadline, "both wait");
            std::thread::yield_now();
        }
        join(&group(2, 3, &address, &secret), None).unwrap();
        let results = [first.join().unwrap(), second.join().unwrap()];
        let refused = results.iter().find_map(|result| result.as_ref().err()).unwrap().to_string();
        assert!(refused.contains("rank 1 is here already"), "{refused}");
        lead.join().unwrap().unwrap();
    });
}

#[test]
fn who_waits_in_vain_says_for_whom() {
    let (listener, address) = leader();
    let secret = Secret::random().unwrap();
    let lonely = Group { patience: Duration::from_millis(200), ..group(0, 2, &address, &secret) };
    let message = join(&lonely, Some(listener)).err().unwrap().to_string();
    assert!(message.contains("for rank 1") && message.contains("2 pods"), "{message}");
    let lost = Group { leader: "no-such-name.invalid:1".to_owned(), rank: 1, ..lonely };
    let message = join(&lost, None).err().unwrap().to_string();
    assert!(message.contains("rank 0"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    /// Whatever a peer of the right attempt sends after the handshake, rank 0 ends with an error.
    #[test]
    fn random_bytes_never_harm(bytes in prop::collection::vec(any::<u8>(), 1..400)) {
        let (result, _) = with_bare_peer(|mut stream| {
            let _ = stream.write_all(&bytes);
        });
        prop_assert!(result.is_err());
    }
}
