//! Runs the jobs of a comparison, over the same storage and by the same code as any job.

use super::jobs::{Comparison, flops_of};
use crate::data::Dataset;
use crate::job::{self, JobEnd, JobError, JobRecord, Result};
use crate::job_file::{LoadedJob, Problem};
use crate::progress::{Reporter, duration};
use crate::storage::Storage;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

/// FLOPs that a job has to spend when nothing of it is done.
fn flops(job: &LoadedJob) -> f64 {
    job.plan.stages.iter().filter(|stage| stage.trained_by.is_none()).map(flops_of).sum()
}

/// What all jobs share.
struct Shared<'a> {
    storage: Storage,
    dataset: Dataset,
    stop: &'a AtomicBool,
}

/// Runs every job of a comparison that is not finished, bases first, then seed by seed; `at_once` of them at a time.
/// Asked to stop, each of them commits where it stands, and the next run goes on.
///
/// # Errors
/// What stops a job; everything committed before stays good.
pub fn run(
    comparison: &Comparison,
    at_once: usize,
    stop: &AtomicBool,
    reporter: &mut Reporter,
) -> Result<JobEnd> {
    let storage = job::open_storage(&comparison.spec.storage)?;
    let jobs: Vec<&LoadedJob> = comparison.jobs().collect();
    for job in &jobs {
        refuse_changes(&storage, job)?;
    }
    let Some(first) = comparison.recipes.first().and_then(|recipe| recipe.runs.first()) else {
        return Ok(JobEnd::AlreadyFinished);
    };
    // One dataset for all: a sample of the files (maxBytes) follows the first seed.
    let dataset = job::prepare_data(&first.job.plan, &storage, reporter)?;
    let shared = Shared { storage, dataset, stop };
    let mut clock = Clock::new(&jobs);
    let (bases, runs) = jobs.split_at(comparison.bases.len());
    let mut end = JobEnd::AlreadyFinished;
    for jobs in [bases, runs] {
        let part = match at_once {
            0 | 1 => shared.one_by_one(jobs, &mut clock, reporter)?,
            _ => shared.side_by_side(jobs, at_once, &mut clock, reporter)?,
        };
        match part {
            JobEnd::Stopped => return Ok(JobEnd::Stopped),
            JobEnd::Finished => end = JobEnd::Finished,
            JobEnd::AlreadyFinished => {}
        }
    }
    Ok(end)
}

/// Refuses a job whose stored object was made from another spec: its checkpoints would not be what the report says.
fn refuse_changes(storage: &Storage, job: &LoadedJob) -> Result<()> {
    let Some(stored) = JobRecord::read(storage, &job.plan.job)? else { return Ok(()) };
    let (new, old) = (&job.job.spec, &stored.spec);
    let fields = [
        ("spec.model", new.model == old.model),
        ("spec.data", new.data == old.data),
        ("spec.training", new.training == old.training),
        ("spec.stages", new.stages == old.stages),
    ];
    let message = "the spec of the comparison says otherwise now; give the comparison another name";
    let problems: Vec<Problem> = fields
        .iter()
        .filter(|(_, same)| !same)
        .map(|(field, _)| Problem::of_field((*field).to_owned(), message.to_owned()))
        .collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(JobError::Changed { uri: storage.uri_of(&format!("{}/job.json", job.plan.job)), problems })
}

impl Shared<'_> {
    fn one_by_one(&self, jobs: &[&LoadedJob], clock: &mut Clock, reporter: &mut Reporter) -> Result<JobEnd> {
        let mut end = JobEnd::AlreadyFinished;
        for job in jobs {
            let begins = clock.begin(job);
            if let Some(last) = job.plan.stages.last()
                && !job::seems_finished(&self.storage, last)?
            {
                reporter.note(&begins);
            }
            match self.run(job, reporter)? {
                JobEnd::Stopped => return Ok(JobEnd::Stopped),
                JobEnd::Finished => {
                    clock.spent(flops(job));
                    end = JobEnd::Finished;
                }
                JobEnd::AlreadyFinished => clock.skipped(flops(job)),
            }
        }
        Ok(end)
    }

    /// Some jobs at a time, each with its share of the compute threads; what they compute does not depend on it.
    fn side_by_side(
        &self,
        jobs: &[&LoadedJob],
        at_once: usize,
        clock: &mut Clock,
        reporter: &mut Reporter,
    ) -> Result<JobEnd> {
        let threads = (rayon::current_num_threads() / at_once).max(1);
        let next = AtomicUsize::new(0);
        let (sender, results) = mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..at_once.min(jobs.len()) {
                let (next, sender) = (&next, sender.clone());
                // Without threads of their own the jobs share those of the program.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().ok();
                scope.spawn(move || {
                    while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if self.stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let began = Instant::now();
                        let run = || self.run(job, &mut Reporter::quiet());
                        let end = pool.as_ref().map_or_else(run, |pool| pool.install(run));
                        if end.is_err() {
                            // The others commit where they stand.
                            self.stop.store(true, Ordering::Relaxed);
                        }
                        // The receiver lives until all senders are gone.
                        let _ = sender.send((*job, end, began.elapsed().as_secs_f64()));
                    }
                });
            }
            drop(sender);
            self.collect(&results, clock, reporter)
        })
    }

    fn collect(
        &self,
        results: &mpsc::Receiver<(&LoadedJob, Result<JobEnd>, f64)>,
        clock: &mut Clock,
        reporter: &Reporter,
    ) -> Result<JobEnd> {
        let (mut end, mut failure) = (JobEnd::AlreadyFinished, None);
        for (job, result, seconds) in results {
            match result {
                Ok(JobEnd::Finished) => {
                    clock.spent(flops(job));
                    reporter.note(&clock.end(job, seconds));
                    end = JobEnd::Finished;
                }
                Ok(JobEnd::AlreadyFinished) => clock.skipped(flops(job)),
                Ok(JobEnd::Stopped) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match failure {
            Some(error) => Err(error),
            None if self.stop.load(Ordering::Relaxed) => Ok(JobEnd::Stopped),
            None => Ok(end),
        }
    }

    fn run(&self, job: &LoadedJob, reporter: &mut Reporter) -> Result<JobEnd> {
        job::agree_on_dataset(&self.storage, &job.plan.job, self.dataset.digest(), |own| {
            format!("it has trained on dataset {own}; give the comparison another name")
        })?;
        job::run(job, Some(1), self.stop, reporter)
    }
}

/// Says how long the rest will take, from the FLOPs so far.
struct Clock {
    began: Instant,
    jobs: usize,
    begun: usize,
    flops_done: f64,
    flops_left: f64,
}

impl Clock {
    fn new(jobs: &[&LoadedJob]) -> Self {
        let flops_left = jobs.iter().map(|job| flops(job)).sum();
        Self { began: Instant::now(), jobs: jobs.len(), begun: 0, flops_done: 0.0, flops_left }
    }

    fn begin(&mut self, job: &LoadedJob) -> String {
        self.begun += 1;
        format!("[{}/{}] {}{}", self.begun, self.jobs, job.plan.job, self.left())
    }

    fn end(&mut self, job: &LoadedJob, seconds: f64) -> String {
        self.begun += 1;
        let (number, jobs, job) = (self.begun, self.jobs, &job.plan.job);
        format!("[{number}/{jobs}] {job}  {}{}", duration(seconds), self.left())
    }

    fn left(&self) -> String {
        if self.flops_done == 0.0 {
            return String::new();
        }
        let seconds = self.began.elapsed().as_secs_f64() * self.flops_left / self.flops_done;
        format!("  about {} left for all", duration(seconds))
    }

    fn spent(&mut self, flops: f64) {
        self.flops_done += flops;
        self.flops_left -= flops;
    }

    fn skipped(&mut self, flops: f64) {
        self.flops_left -= flops;
    }
}
