//! What is measured on curves, and how sure it is.

use crate::report::CurvePoint;
use growth_crds::plan::flops;
use serde::Serialize;

/// A mean over seeds.
#[derive(Serialize, Debug, Clone, Copy, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Standard error of the mean: the sample's standard deviation by the root of its size. Absent for one seed.
    pub standard_error: Option<f64>,
    /// How many seeds.
    pub seeds: usize,
}

impl Estimate {
    /// The mean of some values; `None` without values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let seeds = values.len();
        let count = seeds as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let standard_error = (seeds > 1).then(|| (squares / (count - 1.0) / count).sqrt());
        (seeds > 0).then_some(Self { mean, standard_error, seeds })
    }
}

/// FLOPs at which a curve first comes down to `loss`, linear between its points; `None` when it never does.
pub fn flops_at(curve: &[CurvePoint], loss: f64) -> Option<f64> {
    let first = curve.iter().position(|point| point.loss <= loss)?;
    let reached = curve[first];
    let Some(before) = first.checked_sub(1).map(|before| curve[before]) else { return Some(reached.flops) };
    let share = (before.loss - loss) / (before.loss - reached.loss);
    Some(before.flops + share * (reached.flops - before.flops))
}

/// The paper's speedup, FLOPs of scratch by FLOPs of the recipe, less 1, where both have the same loss: scratch's last
/// one if the recipe comes down to it, else the recipe's last one. 0.546 is 54.6 %; negative where scratch is cheaper.
/// `None` when neither reaches the other's last loss (a curve that is empty or not a number).
///
/// The paper takes smoothed training loss; this is validation loss on fixed text, which needs no smoothing.
pub fn speedup(scratch: &[CurvePoint], recipe: &[CurvePoint]) -> Option<f64> {
    let (scratch_end, recipe_end) = (scratch.last()?, recipe.last()?);
    if let Some(reached) = flops_at(recipe, scratch_end.loss) {
        return Some(flops::speedup(scratch_end.flops, reached));
    }
    Some(flops::speedup(flops_at(scratch, recipe_end.loss)?, recipe_end.flops))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(f64, f64)]) -> Vec<CurvePoint> {
        points.iter().map(|&(flops, loss)| CurvePoint { flops, loss }).collect()
    }

    fn close(found: Option<f64>, expected: f64) {
        let found = found.unwrap();
        assert!((found - expected).abs() < 1e-12, "{found} instead of {expected}");
    }

    #[test]
    fn the_paper_would_count_so() {
        // Its 7B: what 300 units reach from scratch, growth reaches with 194.
        let scratch = curve(&[(0.0, 9.0), (150.0, 4.0), (300.0, 3.0)]);
        let grown = curve(&[(20.0, 5.0), (94.0, 4.0), (294.0, 2.0)]);
        assert_eq!((1000.0 * speedup(&scratch, &grown).unwrap()).round(), 546.0);
        // Figure 3's random-D: it never reaches the loss of scratch, which has its last loss at 74.3 % of the FLOPs.
        let worse = curve(&[(50.0, 6.0), (300.0, 3.5)]);
        let scratch = curve(&[(0.0, 4.243), (300.0, 3.243)]);
        close(speedup(&scratch, &worse), 0.743 - 1.0);
    }

    #[test]
    fn a_speedup_needs_a_common_loss() {
        let scratch = curve(&[(0.0, 5.0), (100.0, 3.0)]);
        assert_eq!(speedup(&scratch, &[]), None);
        assert_eq!(speedup(&[], &scratch), None);
        assert_eq!(speedup(&scratch, &curve(&[(10.0, f64::NAN), (100.0, f64::NAN)])), None);
        close(speedup(&scratch, &scratch), 0.0);
    }

    #[test]
    fn a_loss_is_reached_the_first_time() {
        let curve = curve(&[(10.0, 5.0), (20.0, 4.0), (30.0, 4.5), (40.0, 3.5)]);
        close(flops_at(&curve, 4.5), 15.0);
        close(flops_at(&curve, 4.0), 20.0);
        close(flops_at(&curve, 3.75), 37.5);
        close(flops_at(&curve, 6.0), 10.0);
        assert_eq!(flops_at(&curve, 3.0), None);
    }

    #[test]
    fn one_seed_has_no_error() {
        assert_eq!(Estimate::of(&[]), None);
        assert_eq!(Estimate::of(&[2.0]), Some(Estimate { mean: 2.0, standard_error: None, seeds: 1 }));
        let three = Estimate::of(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!((three.mean, three.seeds), (2.0, 3));
        close(three.standard_error, (1.0_f64 / 3.0).sqrt());
    }
}
