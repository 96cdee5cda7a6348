//! Whether a sandbox's pod is programmed: what the chained plugin waits for, and what is missing if it waits in vain.

use std::collections::BTreeSet;

use datapath::addr::Ip;
use datapath::keys::Guard;

use super::Attachment;
use super::known::is_same;
use crate::ids::identity;
use crate::image::MapImage;
use crate::model::Desired;
use crate::objects::Objects;
use crate::pins::HELD;
use crate::watch::Problem;

/// Whether the kernel has what a pod needs: `applied` is what is in it, if that is whole.
pub(crate) fn programmed(
    a: &Attachment,
    objects: &Objects,
    desired: &Desired,
    applied: Option<&MapImage>,
    problems: &BTreeSet<Problem>,
) -> Result<(), String> {
    let pod = format!("Pod {}/{}", a.namespace, a.name);
    let key = (a.namespace.clone(), a.name.clone());
    let Some(object) = objects.pods.get(&key).filter(|o| o.spec.node_name == desired.node) else {
        return Err(format!("the node's agent knows no {pod} of this node yet"));
    };
    if !is_same(a, object) {
        let known = &object.metadata.uid;
        return Err(format!(
            "the node's agent knows {pod} with UID {known}, and not yet the one with UID {}",
            a.uid
        ));
    }
    let about_pod = || problems.iter().find(|problem| problem.about == pod).map(ToString::to_string);
    let Some(wanted) = desired.pods.get(&key) else {
        return Err(
            about_pod().unwrap_or_else(|| format!("{pod} has another address in its status than here"))
        );
    };
    let Some(image) = applied else {
        let failure = problems.iter().find(|p| p.about.starts_with("this node")).map(ToString::to_string);
        return Err(failure.unwrap_or_else(|| "the node's agent has not programmed the node yet".to_owned()));
    };
    let own = identity(&[&a.namespace, &a.name, &wanted.uid]);
    for ip in &a.addresses {
        let entry = image.pods.get(&Ip::from(*ip));
        let delivery = entry.and_then(|entry| Some((entry, image.delivery.get(&entry.id)?)));
        let Some((entry, _)) = delivery.filter(|(_, d)| d.identity == own && d.mode != HELD) else {
            return Err(
                about_pod().unwrap_or_else(|| format!("{pod}'s address {ip} is not in the node's maps yet"))
            );
        };
        // One that is nobody's business may go whichever way it comes.
        let guarded = image.interfaces.get(&entry.ifindex).is_some_and(|i| i.guarded != Guard::None as u8);
        if entry.is_ours() && !guarded {
            return Err(format!("the node's agent has not seen the interface of {pod} yet"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::SystemTime;

    use datapath::keys::{Delivery, Interface, Pod};

    use super::*;
    use crate::model;

    const IP: &str = "10.1.0.1";

    fn attachment() -> Attachment {
        Attachment {
            namespace: "shop".into(),
            name: "web".into(),
            uid: "u".into(),
            container: "c".into(),
            addresses: vec![IP.parse().unwrap()],
            interfaces: Vec::new(),
            written: SystemTime::UNIX_EPOCH,
        }
    }

    fn objects() -> Objects {
        let pod = serde_saphyr::from_str(
            "metadata: {name: web, namespace: shop, uid: u}\nspec: {nodeName: a}\nstatus: {phase: Pending}",
        );
        Objects { pods: [(("shop".to_owned(), "web".to_owned()), pod.unwrap())].into(), ..Objects::default() }
    }

    fn desired() -> Desired {
        let pod = model::Pod { uid: "u".into(), addresses: attachment().addresses, ..model::Pod::default() };
        let pods = [(("shop".to_owned(), "web".to_owned()), pod)].into();
        Desired { node: "a".into(), pods, ..Desired::default() }
    }

    fn image(policy: u32, mode: u8, guard: Guard) -> MapImage {
        let ip = Ip::from(attachment().addresses[0]);
        let own = identity(&["shop", "web", "u"]);
        MapImage {
            pods: [(ip, Pod { id: 7, policy, ifindex: 10, firewall: 0 })].into(),
            delivery: [(7, Delivery { ip, identity: own, mode, ..Delivery::default() })].into(),
            interfaces: [(10, Interface { guarded: guard as u8, ..Interface::default() })].into(),
            ..MapImage::default()
        }
    }

    fn ask(
        objects: &Objects,
        desired: &Desired,
        image: Option<&MapImage>,
        said: &[(&str, &str)],
    ) -> Result<(), String> {
        let problems = said.iter().map(|(about, message)| Problem::new(about, message)).collect();
        programmed(&attachment(), objects, desired, image, &problems)
    }

    #[test]
    fn what_is_in_the_kernel_is_programmed() {
        for good in [image(1, 2, Guard::Own), image(1, 2, Guard::Guarded), image(0, 2, Guard::None)] {
            assert_eq!(ask(&objects(), &desired(), Some(&good), &[]), Ok(()));
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let good = image(1, 2, Guard::Own);
        let other = Objects {
            pods: objects()
                .pods
                .into_iter()
                .map(|(key, mut pod)| {
                    pod.metadata.uid = "before".into();
                    (key, pod)
                })
                .collect(),
            ..Objects::default()
        };
        let no_pods = Desired { pods: BTreeMap::new(), ..desired() };
        let held = [("Pod shop/web", "held: there is no Namespace shop")];
        let failed = [("this node's maps", "no memory")];
        let mut anothers = good.clone();
        anothers.delivery.get_mut(&7).unwrap().identity = 1;
        for (objects, desired, image, said, part) in [
            (Objects::default(), desired(), Some(&good), &[][..], "knows no Pod shop/web"),
            (objects(), Desired { node: "b".into(), ..desired() }, Some(&good), &[], "knows no Pod shop/web"),
            (other, desired(), Some(&good), &[], "with UID before"),
            (objects(), no_pods.clone(), Some(&good), &held, "no Namespace shop"),
            (objects(), no_pods, Some(&good), &[], "another address"),
            (objects(), desired(), None, &failed, "no memory"),
            (objects(), desired(), None, &[], "has not programmed the node"),
            (objects(), desired(), Some(&MapImage::default()), &[], "10.1.0.1 is not in the node's maps"),
            (objects(), desired(), Some(&anothers), &[], "is not in the node's maps"),
            (objects(), desired(), Some(&image(1, HELD, Guard::Own)), &[], "is not in the node's maps"),
            (objects(), desired(), Some(&image(1, 2, Guard::None)), &[], "has not seen the interface"),
        ] {
            let error = ask(&objects, &desired, image, said).unwrap_err();
            assert!(error.contains(part), "{error}, not {part}");
        }
    }
}
