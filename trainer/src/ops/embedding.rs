//! Embedding: `out[r] = table[ids[r]]`.

use crate::ops::ROW_BLOCK;
use rayon::prelude::*;

/// `out` [rows, hidden] = the rows of `table` [vocab, hidden] that `ids` [rows] name.
pub fn forward(out: &mut [f32], table: &[f32], ids: &[u32], hidden: usize) {
    out.par_chunks_mut(ROW_BLOCK * hidden).zip(ids.par_chunks(ROW_BLOCK)).for_each(|(out, ids)| {
        for (out, &id) in out.chunks_exact_mut(hidden).zip(ids) {
            let first = id as usize * hidden;
            out.copy_from_slice(&table[first..first + hidden]);
        }
    });
}

/// Adds each row of `d_out` [rows, hidden] to the row of `d_table` [vocab, hidden] that `ids` names.
///
/// A task owns a range of the vocabulary and goes through all rows in order, so that a row of the table always
/// sums in the order of the text.
pub fn backward(d_table: &mut [f32], d_out: &[f32], ids: &[u32], hidden: usize) {
    let vocab = d_table.len() / hidden;
    let block = vocab.div_ceil(4 * rayon::current_num_threads()).max(1);
    d_table.par_chunks_mut(block * hidden).enumerate().for_each(|(index, d_table)| {
        let first = index * block;
        let owned = first..first + d_table.len() / hidden;
        for (&id, d_out) in ids.iter().zip(d_out.chunks_exact(hidden)) {
            let id = id as usize;
            if owned.contains(&id) {
                let row = &mut d_table[(id - first) * hidden..][..hidden];
                row.iter_mut().zip(d_out).for_each(|(sum, d)| *sum += d);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_up_and_adds_back() {
        let table: Vec<f32> = (0..15).map(|x| x as f32).collect();
        let ids = [4, 0, 4];
        let mut out = vec![0.0; 9];
        forward(&mut out, &table, &ids, 3);
        assert_eq!(out, [12., 13., 14., 0., 1., 2., 12., 13., 14.]);
        let mut d_table = vec![1.0; 15];
        backward(&mut d_table, &out, &ids, 3);
        assert_eq!(d_table[..3], [1., 2., 3.]);
        assert_eq!(d_table[3..12], [1.0; 9]);
        assert_eq!(d_table[12..], [25., 27., 29.]);
    }
}
