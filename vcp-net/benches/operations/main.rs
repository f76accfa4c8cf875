//! What the operations of the switch take, one file for each of them: `cargo bench -p vcp-net`, or with a part of a name
//! behind `--` only those. Times are those of *one frame*. One program, so that it links once.

mod bed;
mod enqueue;
mod learn;
mod lookup;
mod parse;
mod police;
mod rewrite;
mod snoop;
mod steer;
mod threads;

fn main() {
    let mut criterion = bed::criterion();
    let all = [
        parse::bench,
        police::bench,
        learn::bench,
        snoop::bench,
        lookup::bench,
        rewrite::bench,
        enqueue::bench,
        steer::bench,
        // It pins this thread: the last one.
        threads::bench,
    ];
    all.iter().for_each(|bench| bench(&mut criterion));
    criterion.final_summary();
}
