//! Cuts a text of any length into pieces that are encoded one by one.

use std::io::{self, Read};

/// Bytes read at a time.
const READ_BYTES: usize = 256 << 10;

/// Longest encoding of a character.
const CHARACTER_BYTES: usize = 4;

/// How long a piece may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct PieceLimits {
    /// A text up to this length is one piece, and a cut is made at the first good place from here on.
    pub target: usize,
    /// Without a good place the cut is here, between two characters; a last character or two may follow it.
    pub maximum: usize,
}

impl PieceLimits {
    /// For a tokenizer that splits at newlines, small pieces cost nothing and keep memory low and threads busy;
    /// for others every cut may change a token, so that only long texts are cut.
    pub fn for_splitting(splits_at_newlines: bool) -> Self {
        match splits_at_newlines {
            true => Self { target: 64 << 10, maximum: 1 << 20 },
            false => Self { target: 1 << 20, maximum: 2 << 20 },
        }
    }
}

/// The pieces of a UTF-8 text; where it is cut depends on the text alone, not on how it arrives.
pub(super) struct Pieces<R> {
    text: R,
    limits: PieceLimits,
    read_bytes: usize,
    buffer: Vec<u8>,
    start: usize,
    ended: bool,
}

impl<R: Read> Pieces<R> {
    pub fn new(text: R, limits: PieceLimits) -> Self {
        Self { text, limits, read_bytes: READ_BYTES, buffer: Vec::new(), start: 0, ended: false }
    }

    fn read_more(&mut self) -> io::Result<()> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let read = self.text.by_ref().take(self.read_bytes as u64).read_to_end(&mut self.buffer)?;
        self.ended = read == 0;
        Ok(())
    }

    /// Bytes of the next piece, if what is here decides it.
    fn next_cut(&self) -> io::Result<Option<usize>> {
        let pending = &self.buffer[self.start..];
        if pending.len() <= self.limits.target && !self.ended {
            return Ok(None);
        }
        let text = match std::str::from_utf8(pending) {
            Ok(text) => text,
            Err(error) if error.error_len().is_none() && !self.ended => {
                valid_prefix(pending, error.valid_up_to())
            }
            Err(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "the text is not UTF-8")),
        };
        if let Some(cut) = good_cut(text, self.limits) {
            return Ok(Some(cut));
        }
        if text.len() >= self.limits.maximum + CHARACTER_BYTES {
            return Ok(Some(text.floor_char_boundary(self.limits.maximum)));
        }
        Ok(self.ended.then_some(text.len()))
    }
}

impl<R: Read> Iterator for Pieces<R> {
    type Item = io::Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.next_cut() {
                Ok(Some(0)) => return None,
                Ok(Some(length)) => {
                    let piece = self.buffer[self.start..self.start + length].to_vec();
                    self.start += length;
                    return Some(String::from_utf8(piece).map_err(io::Error::other));
                }
                Ok(None) => {
                    if let Err(error) = self.read_more() {
                        return Some(Err(error));
                    }
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

fn valid_prefix(bytes: &[u8], length: usize) -> &str {
    std::str::from_utf8(&bytes[..length]).unwrap_or_default()
}

/// The place after the first newline, from the target on, that stands alone between two characters which are no
/// white space: GPT-2's expression makes it a word of its own, in the whole text as in the pieces.
fn good_cut(text: &str, limits: PieceLimits) -> Option<usize> {
    let first = text.floor_char_boundary(limits.target.saturating_sub(1));
    let last = text.floor_char_boundary(limits.maximum);
    let newlines = text.get(first..last)?.match_indices('\n').map(|(index, _)| first + index);
    newlines.map(|index| index + 1).find(|&cut| {
        let before = text[..cut - 1].chars().next_back();
        let after = text[cut..].chars().next();
        cut >= limits.target && before.is_some_and(is_word) && after.is_some_and(is_word)
    })
}

fn is_word(character: char) -> bool {
    !character.is_whitespace()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::bpe;
    use crate::tokenizer::Tokenizer;
    use proptest::prelude::*;

    fn cut(text: &str, limits: PieceLimits) -> Vec<String> {
        Pieces::new(text.as_bytes(), limits).collect::<io::Result<_>>().unwrap()
    }

    #[test]
    fn cuts_after_lone_newlines() {
        let limits = PieceLimits { target: 3, maximum: 100 };
        assert_eq!(cut("ab", limits), ["ab"]);
        assert_eq!(cut("ab\ncd", limits), ["ab\n", "cd"]);
        assert_eq!(cut("abcd\n\nef \ng\n hi\njk", limits), ["abcd\n\nef \ng\n hi\n", "jk"]);
        assert_eq!(cut("", limits), [""; 0]);
    }

    #[test]
    fn cuts_between_characters_where_nothing_is_better() {
        let limits = PieceLimits { target: 3, maximum: 7 };
        assert_eq!(cut("ééééééé", limits), ["ééé", "éééé"]);
        assert_eq!(cut(&"é".repeat(10), limits), ["ééé", "ééé", "éééé"]);
    }

    #[test]
    fn what_is_not_utf8_is_an_error() {
        let limits = PieceLimits { target: 3, maximum: 7 };
        for bytes in [&b"ab\xffcdefgh"[..], b"abcdef\xc3"] {
            assert!(Pieces::new(bytes, limits).any(|piece| piece.is_err()));
        }
    }

    fn tokenizer() -> Tokenizer {
        let text = include_str!("pieces.rs");
        Tokenizer::from_json(&bpe::train(bpe::count_words(text).unwrap(), 600).unwrap(), None).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn the_pieces_have_the_tokens_of_the_whole(
            text in "([a-zé漢'1., \t\u{3000}\r]{0,6}(\n|\n\n| ){0,2}){0,60}", target in 1usize..40,
        ) {
            thread_local! { static TOKENIZER: Tokenizer = tokenizer(); }
            // No forced cut: only those at newlines promise the same tokens.
            let limits = PieceLimits { target, maximum: 1 << 20 };
            TOKENIZER.with(|tokenizer| {
                let whole = tokenizer.encode(&text).unwrap();
                let pieces = cut(&text, limits);
                prop_assert_eq!(pieces.concat(), text);
                let parts: Vec<u32> = pieces.iter().flat_map(|piece| tokenizer.encode(piece).unwrap()).collect();
                prop_assert_eq!(parts, whole);
                Ok(())
            })?;
        }

        #[test]
        fn the_cuts_do_not_depend_on_how_the_text_arrives(
            text in "([aé漢 ]{0,9}\n?){0,40}", target in 1usize..20, extra in 0usize..20, step in 1usize..7,
        ) {
            let limits = PieceLimits { target, maximum: target + extra + CHARACTER_BYTES };
            let mut pieces = Pieces::new(text.as_bytes(), limits);
            pieces.read_bytes = step;
            let trickled: Vec<String> = pieces.collect::<io::Result<_>>().unwrap();
            prop_assert_eq!(trickled.concat(), &*text);
            prop_assert!(trickled.iter().all(|piece| piece.len() <= limits.maximum + CHARACTER_BYTES));
            prop_assert_eq!(trickled, cut(&text, limits));
        }
    }
}
