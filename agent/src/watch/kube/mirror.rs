//! What an agent holds of a cluster, without a server: the same reading, sets and view as a watch fills. For who wants to
//! know what that costs.

use std::collections::BTreeMap;

use super::follow::{Page, Scope};
use super::kinds::{Kind, read};
use super::set::{Set, Step};
use super::view::View;
use crate::objects::Objects;

/// A copy of a cluster's objects.
#[derive(Debug)]
pub struct Mirror {
    sets: BTreeMap<Kind, Set>,
    view: View,
}

impl Mirror {
    /// An empty one, of the agent of a node; without a node, of a controller.
    #[must_use]
    pub fn new(node: Option<&str>) -> Self {
        Self { sets: BTreeMap::new(), view: View::new(node) }
    }

    /// How many objects a page of a list has.
    #[must_use]
    pub fn page(kind: Kind) -> usize {
        Scope::all(kind).page() as usize
    }

    /// Takes up a list, by the texts of its pages, as the server sends them.
    ///
    /// # Errors
    /// A page is no list.
    pub fn list(&mut self, kind: Kind, pages: &[String]) -> Result<(), serde_json::Error> {
        let scope = Scope::all(kind).read_for(self.view.own());
        let set = self.sets.entry(kind).or_default();
        set.begin();
        for page in pages {
            // A client has the text of a page while it takes it apart.
            let text = page.clone();
            let page: Page = serde_json::from_str(&text)?;
            drop(text);
            let (_, seen) = page.read(&scope)?;
            set.page(seen);
        }
        for step in set.end(None) {
            match step {
                Step::Put(seen) => drop(self.view.put(kind, *seen)),
                Step::Remove(key) => drop(self.view.remove(kind, &key)),
            }
        }
        Ok(())
    }

    /// Takes up an object that has changed, by its text; whether anything is different now.
    ///
    /// # Errors
    /// It is no object.
    pub fn put(&mut self, kind: Kind, object: &str) -> Result<bool, serde_json::Error> {
        let seen = read(kind, serde_json::from_str(object)?, self.view.own());
        Ok(match self.sets.entry(kind).or_default().put(seen) {
            Some(Step::Put(seen)) => self.view.put(kind, *seen),
            Some(Step::Remove(key)) => self.view.remove(kind, &key),
            None => false,
        })
    }

    /// The objects.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.view.objects
    }
}
