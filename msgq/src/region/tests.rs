use super::*;
use crate::error::Violation;
use crate::layout::Desc;

fn pool(access: Access) -> Pool {
    Pool::new(3, 1, 100, 70, access).unwrap()
}

#[test]
fn each_buffer_is_given_out_once() {
    let pool = pool(Access::Owner);
    assert_eq!((pool.buf_bytes(), pool.buffers()), (128, 70));
    let mut loans: Vec<_> = (0..70).map(|_| pool.loan().unwrap().unwrap()).collect();
    assert!(pool.loan().unwrap().is_none());
    for (n, loan) in loans.iter_mut().enumerate() {
        loan.fill(n as u8);
    }
    for (n, loan) in loans.iter().enumerate() {
        assert!(loan.iter().all(|byte| *byte == n as u8));
    }
    loans.truncate(30);
    assert_eq!(pool.available(), 40);
}

#[test]
fn a_number_is_good_for_one_use_and_not_after_sending() {
    let pool = pool(Access::Owner);
    let raw = pool.loan().unwrap().unwrap().into_raw();
    assert_eq!(pool.available(), 69);
    let loan = pool.from_raw(raw).unwrap();
    assert_eq!(pool.from_raw(raw).unwrap_err(), OwnershipError::Stale(raw.index), "twice");
    let sent = loan.freeze(0..10).sent();
    let generation = raw.generation.wrapping_add(2);
    assert_eq!(
        pool.from_raw(RawBuf { index: sent, generation }).unwrap_err(),
        OwnershipError::Sent(sent),
        "after it was sent"
    );
    pool.inner.release(sent);
    assert_eq!(pool.from_raw(RawBuf { index: sent, generation }).unwrap_err(), OwnershipError::Stale(sent));
    assert!(pool.from_raw(RawBuf { index: 70, generation: 0 }).is_err());
    assert!(pool.blank_from_raw(raw).is_err());
    assert_eq!(pool.available(), 70);
}

#[test]
fn loans_from_several_threads_are_different_buffers() {
    let pool = pool(Access::Both);
    std::thread::scope(|scope| {
        for thread in 0..3u8 {
            let pool = &pool;
            scope.spawn(move || {
                for _ in 0..2000 {
                    let blanks: Vec<_> = (0..20).filter_map(|_| pool.blank().unwrap()).collect();
                    for blank in &blanks {
                        blank.write(0, &[thread; 100]).unwrap();
                    }
                    for blank in &blanks {
                        let mut back = [9; 100];
                        blank.read(0, &mut back).unwrap();
                        assert_eq!(back, [thread; 100]);
                    }
                }
            });
        }
    });
    assert_eq!(pool.available(), 70);
    assert!(pool.loan().is_err());
    let blank = pool.blank().unwrap().unwrap();
    assert!(blank.read(127, &mut [0; 2]).is_err());
    assert!(blank.write(usize::MAX, &[0; 2]).is_err());
}

#[test]
fn references_are_checked_against_the_table() {
    let pool = pool(Access::Owner);
    let mut table = PeerRegions::default();
    let file = pool.file().try_clone_to_owned().unwrap();
    let size = pool.len_bytes() as u64;
    table.insert(3, PeerRegion::new(file, size, 1, Access::Owner).unwrap());
    let good = Desc { region: 3, generation: 1, value: size - 8, len: 8, ..Desc::default() };
    let segment = table.check(&good, 1 << 20).unwrap();
    assert!(table.slice(segment).is_some_and(|slice| slice.len() == 8 && !slice.is_writable()));
    assert!(table.slice(segment).unwrap().write(0, b"x").is_err());
    let wrong = [
        (Desc { region: 2, ..good }, Violation::Region(2)),
        (Desc { region: u16::MAX, ..good }, Violation::Region(u16::MAX)),
        (Desc { generation: 2, ..good }, Violation::Generation { region: 3, generation: 2 }),
        (Desc { len: 0, ..good }, Violation::Length(0)),
        (Desc { len: (1 << 20) + 1, ..good }, Violation::Length((1 << 20) + 1)),
        (Desc { len: 9, ..good }, Violation::Range { region: 3, offset: size - 8, len: 9, size }),
        (
            Desc { value: u64::MAX - 3, ..good },
            Violation::Range { region: 3, offset: u64::MAX - 3, len: 8, size },
        ),
    ];
    for (desc, why) in wrong {
        assert_eq!(table.check(&desc, 1 << 20), Err(why));
    }
    assert!(table.remove(3) && !table.remove(3) && !table.remove(700));
    assert_eq!(table.check(&good, 1 << 20), Err(Violation::Region(3)));
    assert!(table.slice(segment).is_none());
}
