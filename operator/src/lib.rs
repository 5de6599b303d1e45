//! Runs GrowthTrainingJobs on Kubernetes: observe -> decide -> apply. [`decide`] is pure and holds all the rules; the
//! rest sees and does.

pub mod apply;
pub mod cache;
pub mod children;
pub mod controller;
pub mod decide;
pub mod draft;
pub mod failure;
pub mod health;
pub mod leader;
pub mod metrics;
pub mod names;
pub mod observed;
