//! Reads any Hugging Face folder of a LLaMA: several files or one, F32, BF16 or F16, with or without a manifest.

use super::config::{TokenIds, read_config};
use super::error::{CheckpointError, Result};
use super::mask::read_mask;
use super::objects::{Problem, state_digest};
use super::reader::{Commit, commit_of};
use super::tensor_file::TensorIndex;
use super::{
    CONFIG_FILE, MODEL_INDEX_FILE, SINGLE_FILE, TOKENIZER_FILE, TrainingState, digest_object,
    is_optimizer_shard, verify_objects,
};
use crate::model::layout::ParameterLayout;
use crate::model::mask::WeightMasks;
use crate::storage::Storage;
use bytes::Bytes;
use growth_crds::plan::ModelConfig;
use growth_crds::protocol::{CheckpointManifest, CheckpointObject, GROWTH_MASK_FILE, GrowthMaskRecord};
use rayon::prelude::*;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// The output head, absent where it is the embedding.
const HEAD: &str = "lm_head.weight";

const EMBEDDING: &str = "model.embed_tokens.weight";

/// An opened folder: what it holds is known, the weights are not read yet.
#[derive(Debug, Clone)]
pub struct HuggingFaceFolder {
    folder: Storage,
    config: ModelConfig,
    token_ids: TokenIds,
    manifest: Option<CheckpointManifest>,
    mask: Option<GrowthMaskRecord>,
    weight_files: Vec<String>,
    tensors: TensorIndex,
}

#[derive(Deserialize)]
struct IndexFile {
    weight_map: BTreeMap<String, String>,
}

impl HuggingFaceFolder {
    /// Reads the configuration and the headers of the weights, and compares the tensors with the configuration.
    ///
    /// # Errors
    /// When the folder holds no LLaMA that this trainer runs.
    pub fn open(folder: &Storage) -> Result<Self> {
        let manifest = match commit_of(folder, |_| true)? {
            Commit::No => None,
            Commit::Yes(manifest) => Some(*manifest),
            Commit::Damaged(problem) => {
                return Err(CheckpointError::Damaged { uri: folder.uri().to_owned(), problem });
            }
        };
        let (config, token_ids) = read_config(folder)?;
        let (weight_files, weight_map) = weight_files(folder)?;
        let tensors = TensorIndex::read(folder, &weight_files)?;
        let mask = read_mask(folder, manifest.as_ref(), &config)?;
        let folder = folder.clone();
        let opened = Self { folder, config, token_ids, manifest, mask, weight_files, tensors };
        opened.check_weight_map(&weight_map)?;
        opened.check_tensors()?;
        Ok(opened)
    }

    /// Architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Special tokens.
    pub fn token_ids(&self) -> &TokenIds {
        &self.token_ids
    }

    /// The manifest, when this is a checkpoint of a job.
    pub fn manifest(&self) -> Option<&CheckpointManifest> {
        self.manifest.as_ref()
    }

    /// What is masked, when this is a checkpoint inside the ramp of a growth.
    pub fn mask(&self) -> Option<&GrowthMaskRecord> {
        self.mask.as_ref()
    }

    /// Content of `tokenizer.json`, if there is one.
    ///
    /// # Errors
    /// When the storage does not answer.
    pub fn tokenizer(&self) -> Result<Option<Bytes>> {
        if self.folder.head(TOKENIZER_FILE)?.is_none() {
            return Ok(None);
        }
        Ok(Some(self.folder.get(TOKENIZER_FILE)?))
    }

    /// Reads all weights as f32, tensor by tensor; verifies them first when there is a manifest. Masks of a growth are
    /// applied, so these are the weights that the model runs with. The position and the moments start afresh.
    ///
    /// # Errors
    /// When the storage fails, or the weights are damaged.
    pub fn load(&self) -> Result<TrainingState> {
        let layout = ParameterLayout::new(&self.config);
        if self.manifest.is_some() {
            self.verify_weights(&|_| ())?;
        }
        self.check_tied_head()?;
        let mut parameters = vec![0.0; layout.total_len()];
        let mut buffer = Vec::new();
        for tensor in layout.tensors() {
            let place = self.tensors.expect(&self.folder, &tensor.name, &tensor.shape)?;
            let mut rest = &mut parameters[tensor.range()];
            place.read(&self.folder, &mut buffer, |numbers| {
                let (piece, later) = std::mem::take(&mut rest).split_at_mut(numbers.len());
                piece.copy_from_slice(numbers);
                rest = later;
                Ok::<(), CheckpointError>(())
            })?;
        }
        if let Some(GrowthMaskRecord { growth, masks }) = &self.mask {
            WeightMasks::new(&layout, &self.config, growth, masks).scale(0, &mut parameters);
        }
        Ok(TrainingState { parameters, ..TrainingState::default() })
    }

    /// Digest of what the model is: the manifest's state digest, or else one over `config.json` and the weights.
    ///
    /// # Errors
    /// When the storage fails.
    pub fn digest(&self) -> Result<String> {
        match &self.manifest {
            Some(manifest) => Ok(manifest.digest.clone()),
            None => self.digest_of_files(&|_| ()),
        }
    }

    pub(crate) fn folder(&self) -> &Storage {
        &self.folder
    }

    pub(crate) fn tensors(&self) -> &TensorIndex {
        &self.tensors
    }

    /// `config.json`, the masks and the weights.
    pub(crate) fn model_files(&self) -> impl Iterator<Item = &str> {
        let masks = self.mask.iter().map(|_| GROWTH_MASK_FILE);
        std::iter::once(CONFIG_FILE).chain(masks).chain(self.weight_files.iter().map(String::as_str))
    }

    /// The moments' objects of a checkpoint.
    pub(crate) fn optimizer_files(&self) -> Vec<String> {
        let objects = self.manifest.iter().flat_map(|manifest| &manifest.objects);
        objects.map(|object| &object.name).filter(|name| is_optimizer_shard(name)).cloned().collect()
    }

    pub(crate) fn digest_of_files(&self, done: &(dyn Fn(u64) + Sync)) -> Result<String> {
        let names: Vec<&str> = self.model_files().collect();
        let objects: Vec<CheckpointObject> = names
            .par_iter()
            .map(|&name| {
                let (bytes, digest) = digest_object(&self.folder, name, done)?;
                Ok(CheckpointObject { name: name.to_owned(), bytes, digest, state: true })
            })
            .collect::<Result<_>>()?;
        Ok(state_digest(&objects))
    }

    /// Compares configuration and weights with the manifest.
    pub(crate) fn verify_weights(&self, done: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let names: Vec<String> = self.model_files().map(str::to_owned).collect();
        self.verify_files(&names, done)
    }

    /// Compares objects with the manifest.
    pub(crate) fn verify_files(&self, names: &[String], done: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let Some(manifest) = &self.manifest else {
            return Ok(());
        };
        let damaged =
            |problem: Problem| Err(CheckpointError::Damaged { uri: problem.uri, problem: problem.problem });
        if let Some(problem) = super::objects::check_manifest(&self.folder, manifest).into_iter().next() {
            return damaged(problem);
        }
        let mut objects = Vec::with_capacity(names.len());
        for name in names {
            match manifest.objects.iter().find(|object| object.name == *name) {
                Some(object) => objects.push(object),
                None => {
                    let (uri, problem) =
                        (self.folder.uri_of(name), "its manifest does not list it".to_owned());
                    return damaged(Problem { uri, problem });
                }
            }
        }
        match verify_objects(&self.folder, &objects, done)?.into_iter().next() {
            Some(problem) => damaged(problem),
            None => Ok(()),
        }
    }

    /// An explicit head of a tied model must be the embedding; it is not used then.
    pub(crate) fn check_tied_head(&self) -> Result<()> {
        let (Some(head), Some(embedding)) = (self.tensors.get(HEAD), self.tensors.get(EMBEDDING)) else {
            return Ok(());
        };
        if !self.config.tie_word_embeddings {
            return Ok(());
        }
        let not_tied = || CheckpointError::HeadNotTied { uri: self.folder.uri().to_owned() };
        if head.shape != embedding.shape || head.number_type != embedding.number_type {
            return Err(not_tied());
        }
        let start = embedding.bytes.start;
        let mut offset = 0;
        let (mut numbers, piece) = (Vec::new(), &mut Vec::new());
        head.read(&self.folder, &mut numbers, |head_piece| {
            let mut other = embedding.clone();
            let bytes = (head_piece.len() * embedding.number_type.bytes()) as u64;
            other.bytes = start + offset..start + offset + bytes;
            offset += bytes;
            other.read(&self.folder, piece, |embedding_piece| {
                let equal = head_piece.iter().zip(embedding_piece).all(|(a, b)| a.to_bits() == b.to_bits());
                if equal { Ok(()) } else { Err(not_tied()) }
            })
        })
    }

    fn check_weight_map(&self, weight_map: &BTreeMap<String, String>) -> Result<()> {
        for (tensor, file) in weight_map {
            if self.tensors.get(tensor).is_none_or(|place| place.object != *file) {
                let (uri, problem) = (self.folder.uri_of(file), format!("it does not hold {tensor}"));
                return Err(CheckpointError::Format { uri, problem });
            }
        }
        Ok(())
    }

    /// Every tensor of the model is there, in its shape, and no other: a bias or a layer left out would make another
    /// model.
    fn check_tensors(&self) -> Result<()> {
        let layout = ParameterLayout::new(&self.config);
        for tensor in layout.tensors() {
            self.tensors.expect(&self.folder, &tensor.name, &tensor.shape)?;
        }
        // In order, so that the same folder gives the same message.
        let names: BTreeSet<&String> = self.tensors.iter().map(|(name, _)| name).collect();
        for name in names {
            let derived = name.ends_with(".rotary_emb.inv_freq") || name == HEAD;
            if layout.find(name).is_none() && !derived {
                let object = self.tensors.get(name).map_or("", |place| place.object.as_str());
                return Err(CheckpointError::UnknownTensor {
                    uri: self.folder.uri_of(object),
                    tensor: name.clone(),
                });
            }
        }
        Ok(())
    }
}

/// The files that hold weights, and which tensor the index puts where.
fn weight_files(folder: &Storage) -> Result<(Vec<String>, BTreeMap<String, String>)> {
    if folder.head(MODEL_INDEX_FILE)?.is_some() {
        let uri = folder.uri_of(MODEL_INDEX_FILE);
        let index: IndexFile = serde_json::from_slice(&folder.get(MODEL_INDEX_FILE)?)
            .map_err(|error| CheckpointError::Format { uri: uri.clone(), problem: error.to_string() })?;
        let files: BTreeSet<String> = index.weight_map.values().cloned().collect();
        if let Some(outside) = files.iter().find(|file| file.contains('/') || file.starts_with('.')) {
            return Err(CheckpointError::Format {
                uri,
                problem: format!("it names {outside} outside the folder"),
            });
        }
        return Ok((files.into_iter().collect(), index.weight_map));
    }
    if folder.head(SINGLE_FILE)?.is_some() {
        return Ok((vec![SINGLE_FILE.to_owned()], BTreeMap::new()));
    }
    Err(CheckpointError::Missing {
        uri: folder.uri().to_owned(),
        object: format!("{SINGLE_FILE} or {MODEL_INDEX_FILE}"),
        advice: "name the folder of a Hugging Face model, and convert PyTorch .bin files to safetensors"
            .to_owned(),
    })
}
