//! Facts that are newer than a moment. Netlink's notices come when they come; whoever must not go by what was before
//! has the node looked at again.

use tokio::sync::watch;

/// Has the facts read again.
#[derive(Clone, Debug)]
pub struct Fresh {
    /// How often that was asked for.
    wanted: watch::Sender<u64>,
    /// How often it had been when the newest facts began to be read.
    read: watch::Receiver<u64>,
}

/// The reader's side.
#[derive(Debug)]
pub struct Requests {
    wanted: watch::Receiver<u64>,
    read: watch::Sender<u64>,
}

/// The reader has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the node's interfaces are not watched any more")]
pub struct Ended;

/// Both sides.
#[must_use]
pub fn fresh() -> (Fresh, Requests) {
    let (wanted, asked) = watch::channel(0);
    let (done, read) = watch::channel(0);
    (Fresh { wanted, read }, Requests { wanted: asked, read: done })
}

impl Fresh {
    /// Waits until facts are known whose reading has begun after this was called.
    pub async fn look(&self) -> Result<(), Ended> {
        let mut number = 0;
        self.wanted.send_modify(|wanted| {
            *wanted += 1;
            number = *wanted;
        });
        self.read.clone().wait_for(|read| *read >= number).await.map(drop).map_err(|_| Ended)
    }
}

impl Requests {
    /// Waits until somebody asks who has not been heard yet; for ever if nobody can. Cancelling it loses nothing.
    pub async fn asked(&mut self) {
        if self.wanted.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// To be called before the facts are read: whom they will serve.
    pub fn begin(&mut self) -> u64 {
        *self.wanted.borrow_and_update()
    }

    /// To be called when everybody may know those facts.
    pub fn done(&self, served: u64) {
        self.read.send_replace(served);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn only_what_is_read_later_is_fresh() {
        let (fresh, mut requests) = fresh();
        assert!(requests.asked().now_or_never().is_none());
        let before = requests.begin();
        let mut one = Box::pin(fresh.look());
        assert_eq!(one.as_mut().now_or_never(), None);
        requests.done(before);
        assert_eq!(one.as_mut().now_or_never(), None, "its reading had begun");
        requests.asked().now_or_never().expect("one has asked");
        let mut two = Box::pin(fresh.look());
        assert_eq!(two.as_mut().now_or_never(), None);
        let served = requests.begin();
        assert!(requests.asked().now_or_never().is_none(), "both are heard");
        let mut late = Box::pin(fresh.look());
        assert_eq!(late.as_mut().now_or_never(), None);
        requests.done(served);
        assert_eq!((one.await, two.await), (Ok(()), Ok(())));
        assert_eq!(late.as_mut().now_or_never(), None);
        drop(requests);
        assert_eq!(late.await, Err(Ended));
    }
}
