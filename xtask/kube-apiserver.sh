#!/usr/bin/env bash
# kube-apiserver.sh WORK BIN: builds a real kube-apiserver for the tests, from Debian bookworm's packages and sources.
#
# Debian has etcd as a package, and of Kubernetes the client and the whole source: the server is built from that,
# with bookworm's Go. Nothing is installed: packages are unpacked under WORK (about 3 GB for the time of the build),
# and etcd, etcdctl and kube-apiserver end in BIN. The mirror is the one that this machine's apt uses.
# Needs apt-get, dpkg-source (package dpkg-dev) and the Debian archive's keyring. Lines that begin with `==` tell
# the progress.
set -euo pipefail
WORK=$1 BIN=$2
SUITE=bookworm
VERSION=1.20.2
ROOT=$WORK/root
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

say() { echo "== $*"; }
fail() { echo "$*" >&2; exit 1; }

# What `deb` lines of this machine name as Debian's main archive, not security's or others'.
MIRROR=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' | sed -n 's, main$,,p' | grep -E '/debian/?$' | head -n1) ||
  fail "apt on this machine has no mirror of Debian's main archive"
[ -e "$KEYRING" ] || fail "$KEYRING is missing (package debian-archive-keyring)"
APT=(-o Dir::Etc::sourcelist="$WORK/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
     -o Dir::State::lists="$WORK/apt/lists" -o Dir::Cache="$WORK/apt/cache"
     -o APT::Sandbox::User=root -o Acquire::Languages=none)

say "reading the package lists of $SUITE"
mkdir -p "$WORK"/{apt/lists/partial,apt/cache/archives/partial,debs,src} "$ROOT" "$BIN"
printf '%s\n' "deb [signed-by=$KEYRING] $MIRROR $SUITE main" "deb-src [signed-by=$KEYRING] $MIRROR $SUITE main" \
  > "$WORK/apt/sources.list"
apt-get "${APT[@]}" -q update

say "fetching etcd, Go and the source of Kubernetes $VERSION (about 130 MB)"
cd "$WORK/debs"
apt-get "${APT[@]}" -q download etcd-server etcd-client golang-1.19-go golang-1.19-src golang-github-modern-go-reflect2-dev
for deb in *.deb; do dpkg -x "$deb" "$ROOT"; done
rm -f ./*.deb
cd "$WORK/src"
apt-get "${APT[@]}" -q source --download-only --only-source kubernetes
dpkg-source --no-check -x kubernetes_*.dsc k8s
rm -f kubernetes_*
# The vendored reflect2 1.0.1 reads maps wrongly under Go 1.18 and later: the server dies with `fatal error: fault` at
# the first custom resource. Bookworm's own reflect2 1.0.2 is the upstream cure.
rm -rf k8s/vendor/github.com/modern-go/reflect2
cp -r "$ROOT/usr/share/gocode/src/github.com/modern-go/reflect2" k8s/vendor/github.com/modern-go/

export GOROOT=$ROOT/usr/lib/go-1.19 GOPATH=$WORK/gopath GOCACHE=$WORK/gocache GOTMPDIR=$WORK/gotmp
export GO111MODULE=off CGO_ENABLED=0 GOFLAGS='' GOPROXY=off
export PATH=$GOROOT/bin:$PATH
mkdir -p "$GOPATH/src/k8s.io" "$GOTMPDIR"
ln -sfn "$WORK/src/k8s" "$GOPATH/src/k8s.io/kubernetes"
cd "$GOPATH/src/k8s.io/kubernetes"
# Go's GOPATH mode works through the link only if PWD is the link.
export PWD=$GOPATH/src/k8s.io/kubernetes

# The one generated file that the source package lacks.
say "generating the OpenAPI definitions"
go build -o "$WORK/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
directories=$( { grep -rl --include='*.go' '+k8s:openapi-gen=' pkg cmd plugin
    grep -rl --include='*.go' '+k8s:openapi-gen=' staging/src/k8s.io | sed 's,^staging/src/,vendor/,'
  } | grep -vE 'vendor/k8s.io/(code-generator|sample-[a-z-]*)/|_test\.go|/testdata/' | xargs -n1 dirname |
  LC_ALL=C sort -u | sed 's,^,k8s.io/kubernetes/,' | paste -sd,)
"$WORK/openapi-gen" --logtostderr -i "$directories" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
  -h vendor/k8s.io/code-generator/hack/boilerplate.go.txt -r "$WORK/violations.report"
# Upstream's own check that the inputs were the right ones.
cmp "$WORK/violations.report" api/api-rules/violation_exceptions.list

say "building kube-apiserver (some minutes)"
flags="-s -w"
for package in client-go/pkg/version component-base/version; do
  package=k8s.io/kubernetes/vendor/k8s.io/$package
  flags="$flags -X $package.gitVersion=v$VERSION -X $package.gitMajor=1 -X $package.gitMinor=20"
  flags="$flags -X $package.gitTreeState=archive -X $package.buildDate=2021-01-13T00:00:00Z"
done
go build -ldflags "$flags" -o "$BIN/kube-apiserver" ./cmd/kube-apiserver
install "$ROOT/usr/bin/etcd" "$ROOT/usr/bin/etcdctl" "$BIN/"
