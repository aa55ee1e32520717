#!/bin/sh
# Writes go.mod and go.sum: a `tool` line for each upstream program that the tests run.
# k8s.io/kubernetes names its staging modules v0.0.0, with replacements by relative folder, which do not
# work for a module that depends on it; here each is replaced by its published v0.X.Y, the same commit.
# usage: generate.sh [KUBERNETES-VERSION, such as 1.34.4]
set -eu
cd "$(dirname "$0")"
kube=${1:-1.34.4}
staging=v0.${kube#1.}
export GOFLAGS=-mod=mod
rm -f go.mod go.sum
go mod init whydrop-kube >/dev/null 2>&1
upstream=$(go mod download -json "k8s.io/kubernetes@v$kube" | sed -n 's/.*"GoMod": "\(.*\)",*/\1/p')
{
  echo "module whydrop-kube"
  sed -n 's/^go /\ngo /p' "$upstream"
  sed -n 's/^godebug /\ngodebug /p' "$upstream"
  printf '\nrequire k8s.io/kubernetes v%s\n\nreplace (\n' "$kube"
  sed -n 's#^\t\(k8s.io/[a-z-]*\) => ./staging/.*#\t\1 => \1 '"$staging"'#p' "$upstream"
  printf ')\n\ntool (\n'
  for command in kube-apiserver kube-controller-manager kube-proxy kube-scheduler kubectl kubelet; do
    printf '\tk8s.io/kubernetes/cmd/%s\n' "$command"
  done
  printf '\tgo.etcd.io/etcd/server/v3\n)\n'
} > go.mod
go mod tidy
