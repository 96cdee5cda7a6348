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
