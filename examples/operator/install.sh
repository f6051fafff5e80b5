# All of it is in the one namespace that the scenario has, but for the definition. Nothing says how a pod is locked down:
# the cluster fills that in.
set -eu
kubectl apply -f definition.yaml
kubectl wait --for=condition=Established crd/greetings.example.com --timeout=60s
kubectl create configmap greeter-program --from-file=reconcile.sh
sed "s|RUNTIME_IMAGE|$BLASTDOOR_IMAGE|" operator.yaml | kubectl apply -f -
kubectl wait --for=condition=Available deployment/greeter --timeout=120s
