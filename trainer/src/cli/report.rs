//! `growth-trainer report`

use super::{End, Options, load_job, print_json};
use growth_crds::plan::JobPlan;
use growth_trainer::job;
use growth_trainer::report::{self, StageReport};
use growth_trainer::storage::Storage;
use std::path::PathBuf;

/// Name of the plot below the job's folder.
const PLOT_FILE: &str = "report/loss-vs-flops.svg";
/// Name of the data of the report below the job's folder.
const DATA_FILE: &str = "report/report.json";

/// Makes the table and the plots of a job again, from the records inside its checkpoints.
#[derive(clap::Args)]
pub struct Arguments {
    /// Manifest of the job
    job: PathBuf,
}

/// Shows the report of a job.
pub fn run(arguments: &Arguments, options: &Options) -> anyhow::Result<End> {
    let loaded = load_job(&arguments.job)?;
    let storage = job::open_storage(&loaded.job.spec.storage)?;
    show(&loaded.plan, &storage, options)?;
    Ok(End::Done)
}

/// Prints the report, and writes its plot and its data into the storage.
pub fn show(plan: &JobPlan, storage: &Storage, options: &Options) -> anyhow::Result<Vec<StageReport>> {
    let stages = job::report(plan, storage)?;
    let folder = storage.join(&plan.job);
    folder.put(DATA_FILE, serde_json::to_vec_pretty(&stages)?)?;
    let svg = report::svg(&stages);
    if let Some(svg) = &svg {
        folder.put(PLOT_FILE, svg.clone())?;
    }
    if options.json {
        print_json(&stages)?;
        return Ok(stages);
    }
    println!("\n{}\n", report::table(&stages));
    let goodput = stages.iter().map(|stage| (stage.stage.as_str(), stage.goodput));
    if let Some(table) = report::goodput_table(goodput) {
        println!("{table}\n");
    }
    let growths = stages.iter().filter_map(|stage| Some((stage.stage.as_str(), stage.growth.as_ref()?)));
    if let Some(table) = report::growth_table(growths) {
        println!("{table}\n");
    }
    if let Some(plot) = report::plot(&stages, 64, 14) {
        println!("{plot}\n");
    }
    if svg.is_some() {
        println!("plot         {}", folder.uri_of(PLOT_FILE));
    }
    for stage in &stages {
        if let Some(checkpoint) = &stage.checkpoint {
            println!("{:<12} {checkpoint}", stage.stage);
        }
    }
    Ok(stages)
}
