//! Ranks as threads of one process, over real sockets.
#![allow(clippy::unwrap_used)]

use super::{Collective, Group, Identity, Mesh, Result, Secret, meet};
use std::net::TcpListener;
use std::time::Duration;

pub(crate) fn group(rank: usize, world_size: usize, leader: &str, secret: &Secret) -> Group {
    Group {
        rank,
        world_size,
        leader: leader.to_owned(),
        identity: Identity("job/stage/1".to_owned()),
        secret: secret.clone(),
        patience: Duration::from_secs(30),
        part_bytes: 1 << 20,
    }
}

pub(crate) fn leader() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

pub(crate) fn join(group: &Group, listener: Option<TcpListener>) -> Result<Mesh> {
    meet(group, listener, &|_| (), &|| None)
}

/// Runs `work` on every rank of a world; results by rank.
pub(crate) fn together<T: Send>(world: usize, work: impl Fn(&mut dyn Collective) -> T + Sync) -> Vec<T> {
    if world == 1 {
        return vec![work(&mut super::Alone)];
    }
    let (listener, address) = leader();
    let secret = Secret::random().unwrap();
    let mut listener = Some(listener);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (group, listener) = (group(rank, world, &address, &secret), listener.take());
                let work = &work;
                scope.spawn(move || {
                    let mut mesh = join(&group, listener).unwrap();
                    let result = work(&mut mesh);
                    mesh.leave(None);
                    result
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
