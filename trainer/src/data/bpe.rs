//! Trains a byte-level BPE. Ours and not the trainer of the `tokenizers` crate, whose result may depend on the order
//! of a hash map when one token arises from two pairs: here the same words give the same bytes.

use serde_json::{Value, json};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use crate::tokenizer::TokenizerError;

/// The token that ends a document.
const END_OF_TEXT: &str = "<|endoftext|>";

/// How often every word occurs, in the byte-level alphabet.
pub(crate) type WordCounts = HashMap<String, u64>;

type Pair = (u32, u32);

fn splitter() -> ByteLevel {
    ByteLevel::new(false, true, true)
}

/// Counts the words of a text as GPT-2's expression splits it.
pub(crate) fn count_words(text: &str) -> Result<WordCounts, TokenizerError> {
    let mut split = PreTokenizedString::from(text);
    let failed = |error: tokenizers::Error| TokenizerError::Encode { reason: error.to_string() };
    splitter().pre_tokenize(&mut split).map_err(failed)?;
    let mut counts = WordCounts::new();
    for (word, _, _) in split.get_splits(OffsetReferential::Normalized, OffsetType::None) {
        match counts.get_mut(word) {
            Some(count) => *count += 1,
            None => drop(counts.insert(word.to_owned(), 1)),
        }
    }
    Ok(counts)
}

/// The `tokenizer.json` of the vocabulary that the counts give.
pub(crate) fn train(counts: WordCounts, vocab_size: u32) -> Result<String, TokenizerError> {
    let mut merger = Merger::new(counts);
    while merger.tokens.len() < vocab_size as usize && merger.merge_most_frequent() {}
    let unreadable = |error: tokenizers::Error| TokenizerError::Unreadable { reason: error.to_string() };
    let tokenizer = tokenizers::Tokenizer::from_bytes(merger.json().to_string()).map_err(unreadable)?;
    // The crate's own writing: the vocabulary in the order of its ids.
    tokenizer.to_string(false).map_err(unreadable)
}

/// The words as token ids, and how often which pair stands where.
struct Merger {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
    merges: Vec<Pair>,
    merged: HashSet<Pair>,
    words: Vec<(Vec<u32>, u64)>,
    pair_counts: HashMap<Pair, u64>,
    /// Words that hold the pair, or held it once.
    positions: HashMap<Pair, Vec<u32>>,
    /// The most frequent pair first, among equals the smallest; counts may be out of date.
    queue: BinaryHeap<(u64, Reverse<Pair>)>,
}

impl Merger {
    fn new(counts: WordCounts) -> Self {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let tokens: Vec<String> =
            std::iter::once(END_OF_TEXT.to_owned()).chain(alphabet.iter().map(char::to_string)).collect();
        let ids = tokens.iter().cloned().zip(0..).collect();
        let letters: HashMap<char, u32> = alphabet.into_iter().zip(1..).collect();
        let words = counts
            .into_iter()
            .map(|(word, count)| (word.chars().filter_map(|c| letters.get(&c).copied()).collect(), count))
            .collect();
        let mut merger = Self {
            tokens,
            ids,
            merges: Vec::new(),
            merged: HashSet::new(),
            words,
            pair_counts: HashMap::new(),
            positions: HashMap::new(),
            queue: BinaryHeap::new(),
        };
        merger.count_pairs();
        merger
    }

    fn count_pairs(&mut self) {
        for (index, (word, count)) in self.words.iter().enumerate() {
            for pair in word.windows(2).map(|pair| (pair[0], pair[1])) {
                *self.pair_counts.entry(pair).or_default() += count;
                note(self.positions.entry(pair).or_default(), index as u32);
            }
        }
        self.queue = self.pair_counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();
    }

    /// Makes one token of the most frequent pair; false when no pair is left.
    fn merge_most_frequent(&mut self) -> bool {
        while let Some((count, Reverse(pair))) = self.queue.pop() {
            let current = self.pair_counts.get(&pair).copied().unwrap_or(0);
            if current == count && count > 0 {
                self.merge(pair);
                return true;
            }
            if current > 0 && current < count {
                self.queue.push((current, Reverse(pair)));
            }
        }
        false
    }

    fn merge(&mut self, pair: Pair) {
        let token = self.token_of(pair);
        // Seen before when a second pair made one of its halves again: encoding then merges by the first rank.
        if self.merged.insert(pair) {
            self.merges.push(pair);
        }
        let mut grown: HashSet<Pair> = HashSet::new();
        for index in self.positions.remove(&pair).unwrap_or_default() {
            let (word, count) = &mut self.words[index as usize];
            let Some(replaced) = replace(word, pair, token) else { continue };
            for old in word.windows(2).map(|pair| (pair[0], pair[1])) {
                if let Some(total) = self.pair_counts.get_mut(&old) {
                    *total -= *count;
                }
            }
            for new in replaced.windows(2).map(|pair| (pair[0], pair[1])) {
                *self.pair_counts.entry(new).or_default() += *count;
                if new.0 == token || new.1 == token {
                    note(self.positions.entry(new).or_default(), index);
                    grown.insert(new);
                }
            }
            *word = replaced;
        }
        self.pair_counts.remove(&pair);
        self.queue.extend(
            grown.into_iter().filter_map(|pair| Some((*self.pair_counts.get(&pair)?, Reverse(pair)))),
        );
    }

    /// The id of the joined token, new or, when another pair spells the same, known.
    fn token_of(&mut self, (left, right): Pair) -> u32 {
        let text = format!("{}{}", self.tokens[left as usize], self.tokens[right as usize]);
        let next = self.tokens.len() as u32;
        let id = *self.ids.entry(text.clone()).or_insert(next);
        if id == next {
            self.tokens.push(text);
        }
        id
    }

    fn json(&self) -> Value {
        let text = |id: u32| &self.tokens[id as usize];
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [{
                "id": 0, "content": END_OF_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }],
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": byte_level,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": self.ids,
                "merges": self.merges.iter().map(|&(left, right)| [text(left), text(right)]).collect::<Vec<_>>(),
            },
        })
    }
}

/// Adds a word's index once; they come in order, word by word.
fn note(positions: &mut Vec<u32>, index: u32) {
    if positions.last() != Some(&index) {
        positions.push(index);
    }
}

/// The word with every occurrence of the pair as one token; `None` when there is none.
fn replace(word: &[u32], pair: Pair, token: u32) -> Option<Vec<u32>> {
    let mut replaced = Vec::with_capacity(word.len());
    let mut position = 0;
    while position < word.len() {
        if word[position..].starts_with(&[pair.0, pair.1]) {
            replaced.push(token);
            position += 2;
        } else {
            replaced.push(word[position]);
            position += 1;
        }
    }
    (replaced.len() < word.len()).then_some(replaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str, vocab_size: u32) -> Vec<String> {
        let json: Value =
            serde_json::from_str(&train(count_words(text).unwrap(), vocab_size).unwrap()).unwrap();
        let vocab = json["model"]["vocab"].as_object().unwrap();
        let mut tokens = vec![String::new(); vocab.len()];
        for (token, id) in vocab {
            tokens[id.as_u64().unwrap() as usize] = token.clone();
        }
        tokens
    }

    #[test]
    fn the_most_frequent_pair_comes_first() {
        let tokens = tokens("hug hug hug hug hug hug hug hug hug hug pug pug pug pug pug pun bun", 261);
        assert_eq!(tokens[0], END_OF_TEXT);
        assert_eq!(&tokens[257..], ["ug", "hug", "Ġhug", "Ġp"]);
    }

    #[test]
    fn a_vocabulary_ends_with_the_text() {
        assert_eq!(tokens("ab", 1000).len(), 258);
    }

    #[test]
    fn agrees_with_the_encoder() {
        // Every word of the training text is encoded as the training left it: the merges are complete and in order.
        let text =
            "banana bandana ananas abcabc aabcbc abab baba aaaa aaaaa the then there other bother ".repeat(3);
        let counts = count_words(&text).unwrap();
        let mut merger = Merger::new(counts);
        while merger.tokens.len() < 330 && merger.merge_most_frequent() {}
        let tokenizer = tokenizers::Tokenizer::from_bytes(merger.json().to_string()).unwrap();
        for (ids, _) in &merger.words {
            let spelled: String = ids.iter().map(|&id| merger.tokens[id as usize].as_str()).collect();
            let encoded = tokenizer.encode_fast(spelled.replace('Ġ', " "), false).unwrap();
            assert_eq!(encoded.get_ids(), ids, "{spelled}");
        }
    }

    #[test]
    fn counts_of_pieces_add_up_in_any_order() {
        let text = include_str!("bpe.rs");
        let whole = count_words(text).unwrap();
        let first = train(whole.clone(), 500).unwrap();
        let mut reversed: Vec<_> = whole.into_iter().collect();
        reversed.reverse();
        assert_eq!(train(reversed.into_iter().collect(), 500).unwrap(), first);
    }
}
