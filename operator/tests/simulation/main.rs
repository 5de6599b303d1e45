//! The operator in a small world in memory, in which everything that can go wrong does, in any order: calls are refused,
//! lost, or carried out and not answered; watches are late; the operator dies between any two calls; nodes, pods and Jobs
//! go; users change their minds. The operator's own `decide` and writer run unchanged, behind a real client.
//!
//! Two tests of half a million reconciles each. A failure prints the shortest story that leads to it, and is kept in
//! `tests/simulation/regressions.rs`. `GROWTH_SIMULATION_SEED=<number>` repeats a run, `GROWTH_SIMULATION_STEPS` changes
//! its length.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod api_server;
#[path = "../../../crds/tests/common/mod.rs"]
mod common;
mod kubernetes;
mod operator;
mod regressions;
mod world;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use world::{Action, Setting, World, actions, settings};

const STEPS: u64 = 500_000;
const ACTIONS_PER_STORY: usize = 150;
const STORIES_PER_RUN: u32 = 100;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// Tells one story; returns reconciles and writes.
fn tell(setting: &Setting, story: &[Action]) -> Result<(u64, u64), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(setting);
        for action in story {
            world.act(action).await?;
        }
        world.come_to_an_end().await?;
        Ok((world.reconciles, world.writes()))
    })
}

fn runner(seed: u64, run: u64) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&run.to_le_bytes());
    let config = Config {
        cases: STORIES_PER_RUN,
        failure_persistence: None,
        max_shrink_time: 30_000, // ms
        ..Config::default()
    };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

fn tell_many(operators: usize) {
    let seed = number("GROWTH_SIMULATION_SEED").unwrap_or_else(rand::random);
    let wanted = number("GROWTH_SIMULATION_STEPS").unwrap_or(STEPS);
    println!("GROWTH_SIMULATION_SEED={seed}");
    let stories = (settings(operators), prop::collection::vec(actions(operators), 0..ACTIONS_PER_STORY));
    let (reconciles, writes) = (AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    for run in 0_u64.. {
        if reconciles.load(Ordering::Relaxed) >= wanted {
            break;
        }
        let told = runner(seed, run).run(&stories, |(setting, story)| {
            let (more_reconciles, more_writes) = tell(&setting, &story)?;
            reconciles.fetch_add(more_reconciles, Ordering::Relaxed);
            writes.fetch_add(more_writes, Ordering::Relaxed);
            Ok(())
        });
        match told {
            Ok(()) => {}
            Err(TestError::Fail(why, (setting, story))) => {
                panic!("GROWTH_SIMULATION_SEED={seed}: {why}\n{setting:?}\nvec!{story:#?}")
            }
            Err(TestError::Abort(why)) => panic!("{why}"),
        }
    }
    println!(
        "{} reconciles, {} writes, {operators} operator(s), {:.0} s",
        reconciles.into_inner(),
        writes.into_inner(),
        began.elapsed().as_secs_f64()
    );
}

#[test]
fn whatever_happens_the_job_comes_to_its_end() {
    tell_many(1);
}

/// One of them has lost its lease and does not know it yet.
#[test]
fn two_leaders_do_no_harm() {
    tell_many(2);
}
