# A Greeting becomes a ConfigMap with its text, again and again; a status says that it is there. kubectl finds the account
# of its pod by itself.
WANTED='{{range .items}}---
apiVersion: v1
kind: ConfigMap
metadata:
  name: greeting-{{.metadata.name}}
data:
  text: Hello, {{.spec.name}}!
{{end}}'
while true; do
  kubectl get greetings --output=go-template="$WANTED" > /tmp/wanted && touch /tmp/looked
  if [ -s /tmp/wanted ]; then
    kubectl apply --server-side --validate=false --filename=/tmp/wanted &&
      for name in $(kubectl get greetings --output=name); do
        kubectl patch "$name" --subresource=status --type=merge --patch='{"status": {"ready": true}}'
      done
  fi
  sleep 1
done
