//! The ramp over which the masks of a growth rise: a function of the stage's plan and of the tokens that it has trained.

use crate::checkpoint::{ExtraFile, mask_file};
use crate::model::llama::Llama;
use crate::model::mask::WeightMasks;
use growth_crds::plan::growth_mask::GrowthMasks;
use growth_crds::plan::{GrowthPlan, StagePlan, StageStart};
use growth_crds::protocol::GrowthMaskRecord;

/// The ramp of a stage.
#[derive(Debug, Clone, Copy)]
pub struct Ramp<'a> {
    growth: &'a GrowthPlan,
    tokens: u64,
}

impl<'a> Ramp<'a> {
    /// The ramp of a stage whose growth has masks.
    pub fn of(plan: &'a StagePlan) -> Option<Self> {
        match (&plan.start, plan.mask_ramp_tokens) {
            (StageStart::Growth(growth), Some(tokens)) if growth.is_masked() => Some(Self { growth, tokens }),
            _ => None,
        }
    }

    /// The masks after so many tokens of the stage; `None` once all are 1.
    pub fn masks(&self, tokens: u64, model: &Llama) -> Option<WeightMasks> {
        let masks = self.at(tokens)?;
        Some(WeightMasks::new(model.layout(), model.config(), self.growth, &masks))
    }

    /// What a checkpoint after so many tokens says of them.
    pub fn file(&self, tokens: u64) -> Option<ExtraFile> {
        let masks = self.at(tokens)?;
        Some(mask_file(&GrowthMaskRecord { growth: self.growth.clone(), masks }))
    }

    fn at(&self, tokens: u64) -> Option<GrowthMasks> {
        Some(self.growth.masks(tokens, self.tokens)).filter(|masks| *masks != GrowthMasks::OPEN)
    }
}
